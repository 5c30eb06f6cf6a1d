"""`make simulate-users`: writes docs/scale.md and its two plots. No GPU, no rank; a minute of one core."""

from __future__ import annotations

from pathlib import Path

from benchmarks.users import limits, plots, studies, tables
from benchmarks.users.fleet import PER_MACHINE, SIZES
from benchmarks.users.simulation import Outcome

TEMPLATE = Path(__file__).with_name("scale.template.md")
DOCS = Path(__file__).parent.parent.parent / "docs"
DOCUMENT = DOCS / "scale.md"
POLICY_LOAD, GROWTH_LOAD, VIDEO_LOADS = 0.6, 0.7, (0.3, 0.6, 0.8)
MACHINES = (1, 10, 100, 1250)


def documents(machines: tuple[int, ...] = MACHINES) -> dict[str, str]:
    """The page and its plots, by file name in docs/."""
    cut, grown = list(studies.cuts()), list(studies.sizes(GROWTH_LOAD, machines))
    measured = studies.measured()
    page = TEMPLATE.read_text(encoding="utf-8").format(
        **limits.figures(),
        gpus=studies.GPUS,
        count=studies.COUNT,
        seed=studies.SEED,
        most=machines[-1] * PER_MACHINE,
        readings=" and ".join(f"{rate / 1e9:.1f}" for rate in measured["bytes_per_second"]),
        machine=measured["machine"],
        date=measured["date"],
        policy_load=POLICY_LOAD,
        growth_load=GROWTH_LOAD,
        services=tables.services(),
        capacities=tables.capacities(),
        cuts=tables.cuts(cut),
        in_theory=tables.in_theory(machines[-1] * PER_MACHINE),
        policies=tables.policies(POLICY_LOAD),
        rates=tables.reading_rates(POLICY_LOAD),
        sizes=tables.sizes(grown),
        videos=tables.with_videos(VIDEO_LOADS),
        checks=tables.checked(studies.SEED),
        over_two=tables.over_two_machines(),
    )
    return {"scale.md": page, "scale-cuts.svg": _cuts(cut)}


def _cuts(cut: list[tuple[float, dict[int, Outcome | None]]]) -> str:
    """The lines of the first table."""
    series = {
        f"{size} GPU{'s' if size > 1 else ''} per group": [
            (rate, row[size].slowest()) for rate, row in cut if row[size] is not None
        ]
        for size in SIZES
    }
    title = f"{studies.GPUS} x {studies.CARD}, pictures: 95 % are done within"
    return plots.lines(title, "requests per second", "seconds", {k: v for k, v in series.items() if v})


def main() -> None:
    """Print the page and write it with its plots."""
    for name, text in documents().items():
        (DOCS / name).write_text(text, encoding="utf-8")
        if name == DOCUMENT.name:
            print(text)


if __name__ == "__main__":
    main()
