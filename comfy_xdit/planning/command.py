"""`comfy-xdit plan`: the candidates for a model and a picture, and which one `auto` takes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from comfy_xdit.planning import cluster, planner
from comfy_xdit.planning.auto import description, dtype_bytes, machine
from comfy_xdit.planning.cluster import Cluster
from comfy_xdit.planning.measured import Measured
from comfy_xdit.planning.planner import Candidate, Plan, figure, short
from comfy_xdit.planning.published import PUBLISHED
from comfy_xdit.planning.request import ModelShape, Request
from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.parallel import available_devices
from comfy_xdit.protocol.spec import ModelSpec

HEADERS = ("layout", "ranks", "predicted", "measured", "speed-up", "memory/rank", "")
SHOWN = 12
GIB = 1 << 30


def lines(
    model: Path | None,
    family: str,
    devices: str | None,
    pipefusion: bool = False,
    every: bool = False,
    **size: Any,
) -> Iterator[str]:
    """The report: request, machine, table, pick.

    Args:
        model: a file or folder; without one the published shape named `family` is planned for.
        devices: a cluster in words (`cluster.parse`), or None for this machine.
        pipefusion: whether to list PipeFusion, which XDiTSampler runs and `auto` never takes.
        every: all candidates instead of the first SHOWN.
        size: width, height, steps, batch, and cfg (None: as the family uses guidance).

    Raises:
        InvalidInput: no such model, family or cluster, or a size below 1.
    """
    _check(size)
    where = cluster.parse(devices) if devices else machine(available_devices())
    request = _request(model, family, where, {k: v for k, v in size.items() if v is not None})
    chosen = planner.plan(request, where, Measured.load(), pipefusion)
    yield (
        f"{request.shape.family}, {request.shape.parameters / 1e9:.3g} billion parameters, "
        f"{request.image_tokens} + {request.text_tokens} tokens, {request.rows} rows, {request.steps} steps, "
        f"{8 * request.dtype_bytes} bits, on {where.describe()}"
    )
    yield ""
    yield from table(chosen, request.steps, None if every else SHOWN)
    yield ""
    yield f"pick: {chosen.pick.layout.describe()}: {chosen.why}"
    if pipefusion:
        yield "PipeFusion's image differs a little after its warm-up steps: auto never takes it."


def _check(size: dict[str, Any]) -> None:
    for name in ("width", "height", "steps", "batch"):
        if size[name] < 1:
            raise InvalidInput(f"{name} is {size[name]}; it is at least 1.")


def _request(model: Path | None, family: str, where: Cluster, size: dict[str, Any]) -> Request:
    if model is not None:
        spec = ModelSpec.of(model, "transformer")
        told = description(spec)
        bytes_ = dtype_bytes(told, spec, where.device.kind)
        return Request.picture(ModelShape.of(told), dtype_bytes=bytes_, **size)
    if family not in PUBLISHED:
        raise InvalidInput(f"family {family!r} is not one of {', '.join(PUBLISHED)}; or name a --model.")
    bytes_ = 4 if where.device.kind == "cpu" else 2
    return Request.picture(PUBLISHED[family], dtype_bytes=bytes_, **size)


def table(chosen: Plan, steps: int, limit: int | None = None) -> Iterator[str]:
    """The candidates as text, fastest first, and one rank wherever it comes."""
    one = next(c for c in chosen.ranked if c.layout.world_size == 1)
    shown = list(chosen.ranked[:limit])
    shown += [c for c in (chosen.pick, one) if c not in shown]
    rows = [HEADERS, *(_row(c, one, chosen.pick, steps) for c in shown)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADERS))]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    if len(shown) < len(chosen.ranked):
        yield f"... and {len(chosen.ranked) - len(shown)} more (--all)"


def _row(candidate: Candidate, one: Candidate, pick: Candidate, steps: int) -> tuple[str, ...]:
    prediction = candidate.prediction
    remarks = ["<- pick"] if candidate is pick else []
    if not prediction.fits:
        remarks.append("does not fit")
    if not prediction.exact:
        remarks.append("not exact")
    return (
        short(candidate),
        str(candidate.layout.world_size),
        f"{figure(prediction.seconds * steps)} s",
        f"{figure(candidate.measured * steps)} s" if candidate.measured is not None else "-",
        f"{one.expected / candidate.expected:.2f}",
        f"{prediction.memory / GIB:.1f} GiB",
        ", ".join(remarks),
    )


def outline(devices: tuple[str, ...]) -> Iterator[str]:
    """For doctor: this machine as the planner sees it, and what `auto` takes for published models."""
    where = machine(devices)
    yield f"the planner sees {where.describe()}, {where.device.memory / GIB:.1f} GiB for each"
    for name in PUBLISHED:
        request = _request(None, name, where, {})
        chosen = planner.plan(request, where, Measured.load())
        yield f"strategy auto, {name} at 1024 x 1024: {short(chosen.pick)}: {chosen.why}"
