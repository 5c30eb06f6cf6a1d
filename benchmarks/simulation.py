"""The planner's model on described clusters against published latencies: `make simulate`.

Prints and writes docs/planner.md: per row what was published and what is predicted, the rank order
of methods per setting, and claims that sources make of figures without numbers.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.published import CLAIMS, SERIES, Claim, Series, layout
from comfy_xdit.planning import cluster
from comfy_xdit.planning.cluster import Cluster
from comfy_xdit.planning.prediction import predict
from comfy_xdit.protocol.parallel import ParallelConfig

TEMPLATE = Path(__file__).with_name("planner.template.md")
DOCUMENT = Path(__file__).parent.parent / "docs" / "planner.md"
TIE = 0.03  # published times closer than that have no order


@dataclass(frozen=True)
class Row:
    """One layout of a series, in seconds; for speed-ups in multiples of the one-device time."""

    series: Series
    layout: str
    published: float
    predicted: float

    @property
    def calibration(self) -> bool:
        """Whether the constants were fitted to this row."""
        return self.layout in self.series.calibration

    @property
    def error(self) -> float:
        """Relative error of the predicted time."""
        return self.predicted / self.published - 1

    @property
    def ranks(self) -> int:
        """How many devices the layout takes."""
        return layout(self.layout).world_size


def rows() -> list[Row]:
    """Every published row with its prediction."""
    return [row for series in SERIES for row in _rows(series)]


def _rows(series: Series) -> Iterator[Row]:
    where = calibrated(series)
    steps, outside = series.request.steps, series.outside

    def seconds(config: ParallelConfig) -> float:
        return predict(config, series.request, where, series.constants).seconds * steps + outside

    one = seconds(ParallelConfig())
    for name, value in series.rows.items():
        if series.one is None:
            yield Row(series, name, 1 / value, seconds(layout(name)) / one)
        else:
            yield Row(series, name, value, seconds(layout(name)))


def calibrated(series: Series) -> Cluster:
    """The described cluster, its device as fast as the series' one-device time says."""
    where = cluster.parse(series.devices)
    if series.one is None:
        return where
    slow, fast = 1e12, 1e16
    for _ in range(60):
        rate = (slow * fast) ** 0.5
        where = replace(where, device=replace(where.device, matmul=rate))
        step = predict(ParallelConfig(), series.request, where, series.constants).seconds
        too_slow = step * series.request.steps + series.outside > series.one
        slow, fast = (rate, fast) if too_slow else (slow, rate)
    return where


def orders(found: list[Row]) -> Iterator[tuple[str, list[Row], list[tuple[Row, Row]]]]:
    """Settings (series and number of devices) with two methods or more, and the pairs in wrong order."""
    for (name, ranks), group in itertools.groupby(
        sorted(found, key=lambda r: (SERIES.index(r.series), r.ranks)), key=lambda r: (r.series.name, r.ranks)
    ):
        methods = sorted(group, key=lambda r: r.published)
        if len(methods) > 1:
            wrong = [
                (fast, slow)
                for fast, slow in itertools.combinations(methods, 2)
                if slow.published > fast.published * (1 + TIE) and slow.predicted < fast.predicted
            ]
            yield f"{name}, {ranks} devices", methods, wrong


def holds(claim: Claim) -> bool:
    """Whether the model agrees with a claim."""

    def seconds(name: str, devices: str) -> float:
        return predict(layout(name), claim.request, cluster.parse(devices), claim.constants).seconds

    best = seconds(*claim.faster)
    return all(best < seconds(*other) for other in claim.slower)


def mean_error(found: list[Row]) -> float:
    """Mean of the absolute relative errors."""
    return statistics.fmean(abs(row.error) for row in found)


def document() -> str:
    """docs/planner.md."""
    found = rows()
    fitted, checked = [r for r in found if r.calibration], [r for r in found if not r.calibration]
    settings = list(orders(found))
    claims = [(claim, holds(claim)) for claim in CLAIMS]
    figures = {
        "fitted": len(fitted),
        "checked": len(checked),
        "mean": 100 * mean_error(checked),
        "median": 100 * statistics.median(abs(row.error) for row in checked),
        "fitted_mean": 100 * mean_error(fitted),
        "settings": len(settings),
        "right": sum(not wrong for _, _, wrong in settings),
        "claims": len(claims),
        "agreed": sum(agrees for _, agrees in claims),
    }
    tables = {
        "table": "\n".join(_row_lines(found)),
        "order": "\n".join(_order_lines(settings)),
        "told": "\n".join(_claim_lines(claims)),
        "sources": "\n".join(sorted({f"* {series.name}: {series.source}" for series in SERIES})),
    }
    return TEMPLATE.read_text(encoding="utf-8").format(**figures, **tables)


def _row_lines(found: list[Row]) -> Iterator[str]:
    yield from ("| series | layout | published | predicted | error of time | |", "|---|---|---|---|---|---|")
    for row in found:
        relative = row.series.one is None
        published, predicted = (
            f"{1 / value:.2f} x" if relative else f"{value:.2f} s" for value in (row.published, row.predicted)
        )
        error, mark = f"{100 * row.error:+.1f} %", "fitted" if row.calibration else ""
        yield f"| {row.series.name} | {row.layout} | {published} | {predicted} | {error} | {mark} |"


def _order_lines(settings: list[tuple[str, list[Row], list[tuple[Row, Row]]]]) -> Iterator[str]:
    yield from ("| setting | published order (fastest first) | in wrong order |", "|---|---|---|")
    for name, methods, wrong in settings:
        said = "; ".join(f"{fast.layout} before {slow.layout}" for fast, slow in wrong) or "none"
        yield f"| {name} | {', '.join(r.layout for r in methods)} | {said} |"


def _claim_lines(claims: list[tuple[Claim, bool]]) -> Iterator[str]:
    yield from ("| claim | of | source | the model agrees |", "|---|---|---|---|")
    for claim, agrees in claims:
        what = f"{claim.request.shape.family}, {claim.request.image_tokens} tokens, {claim.faster[1]}"
        yield f"| {claim.text} | {what} | {claim.source} | {'yes' if agrees else '**no**'} |"


def main() -> None:
    """Print the document and write it."""
    text = document()
    print(text)
    DOCUMENT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
