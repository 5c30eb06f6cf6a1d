"""The tables of docs/scale.md as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.users import checks, fleet, studies
from benchmarks.users.fleet import KINDS, PICTURES, SIZES, VIDEO
from benchmarks.users.machines import PUBLISHED_OVER_TWO
from benchmarks.users.simulation import Outcome


def rows(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body))


def figure(value: float) -> str:
    """Three digits, and whole numbers from a hundred on."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def services() -> str:
    """What a request takes, by GPUs of a group."""
    body = []
    for gpu, names in ((studies.CARD, PICTURES), (studies.VIDEO_CARD, KINDS)):
        for kind in names:
            found = [fleet.service(gpu, size, kind) for size in SIZES]
            body.append([gpu, kind, *(f"{figure(one.seconds)} ({one.layout})" for one in found)])
    return rows(["GPUs", "request", *map(str, SIZES)], body)


def capacities() -> str:
    """Requests per second by the size of groups."""
    body = []
    for gpu, name, shares in (
        (studies.CARD, "pictures", PICTURES),
        (studies.VIDEO_CARD, "pictures and 2 % videos", fleet.VIDEOS),
    ):
        found = [fleet.capacity(gpu, studies.GPUS, size, shares) for size in SIZES]
        body.append([f"{studies.GPUS} x {gpu}", name, *map(figure, found)])
    return rows(["GPUs", "asked for", *map(str, SIZES)], body)


def _times(outcome: Outcome | None, best: bool = False) -> str:
    """Mean and 95 % of the seconds from arrival to end."""
    if outcome is None:
        return "grows"
    words = f"{figure(outcome.latency.mean)} / {figure(outcome.slowest())}"
    return f"**{words}**" if best else words


def cuts(found: Sequence[tuple[float, dict[int, Outcome | None]]]) -> str:
    """By rate and size; the least mean is bold."""
    body = []
    for rate, row in found:
        least = min(o.latency.mean for o in row.values() if o is not None)
        cells = [_times(o, o is not None and o.latency.mean == least) for o in row.values()]
        body.append([figure(rate), *cells])
    return rows(["requests/s", *map(str, SIZES)], body)


def in_theory(gpus: int) -> str:
    """The same without switches, by closed form."""
    body = [
        [figure(rate), *("grows" if seconds is None else figure(seconds) for seconds in row.values())]
        for rate, row in studies.in_theory(gpus)
    ]
    return rows(["requests/s", *map(str, SIZES)], body)


def policies(load: float) -> str:
    """By policy and what a switch costs, for groups of one and of four."""
    body = []
    for size in (1, 4):
        for name, row in studies.policies(size, load):
            cells = [
                "grows" if o.busy >= studies.FULL else f"{_times(o)} ({100 * o.switching:.0f} %)"
                for o in row.values()
            ]
            body.append([str(size), name, *cells])
    return rows(["GPUs per group", "queue", *studies.switchings()], body)


def reading_rates(load: float) -> str:
    """By how fast a rank reads."""
    body = []
    for rate, row in studies.reading_rates(load):
        body.append([f"{rate / 1e9:.1f} GB/s", *(_times(_unless_full(o)) for o in row.values())])
    return rows(["a rank reads", *studies.POLICIES], body)


def sizes(found: Sequence[tuple[int, dict[str, Outcome], float]]) -> str:
    """Mean waits by machines."""
    body = []
    for machines, row, theory in found:
        cells = ["grows" if o.busy >= studies.FULL else _wait(o.wait.mean) for o in row.values()]
        body.append([str(machines), str(machines * fleet.PER_MACHINE), *cells, _wait(theory)])
    return rows(["machines", "GPUs", *studies.POLICIES, "one queue, no switches (closed form)"], body)


def with_videos(loads: Sequence[float]) -> str:
    """What 95 % of pictures and of videos do not exceed."""
    body = []
    for load in loads:
        for name, outcome in studies.with_videos(load):
            times = [outcome.slowest(kind=kind) for kind in ("FLUX.1", VIDEO)]
            body.append([f"{load:.1f}", name, *_full(outcome, map(figure, times)), f"{outcome.busy:.2f}"])
    return rows(["load", "groups", "FLUX.1, 95 %", "video, 95 %", "busy"], body)


def checked(seed: int) -> str:
    """The simulation against closed forms."""
    body = []
    for case in checks.CASES:
        one = checks.check(case, seed)
        wait = f"{one.wait.mean:.4g} ± {one.wait.half():.2g}"
        holds = "yes" if one.wait.holds(case.wait) else "99.9 %" if one.holds() else "**no**"
        body.append([case.name, f"{case.load}", f"{one.busy:.3f}", wait, f"{case.wait:.4g}", holds])
    busy, load = checks.switched_load(seed)
    body.append(["one host, two models, room for one", f"{load}", f"{busy:.3f}", "", "", ""])
    return rows(["queue", "utilisation", "simulated", "mean wait, 95 %", "closed form", "inside"], body)


def over_two_machines() -> str:
    """The planner's predictions for what was published of two machines."""
    body = []
    for row in PUBLISHED_OVER_TWO:
        predicted, time = row.predicted()
        unit = "s" if row.against is None else f"x {row.against}"
        cells = [f"{row.value:g} {unit}", f"{predicted:.3g}", time.layout, f"{100 * row.error:+.0f} %"]
        body.append([row.name, row.devices, row.source, *cells])
    return rows(["what", "on", "source", "published", "predicted", "layout", "error of time"], body)


def _unless_full(outcome: Outcome) -> Outcome | None:
    return None if outcome.busy >= studies.FULL else outcome


def _full(outcome: Outcome, cells: Iterator[str]) -> list[str]:
    return ["grows" if outcome.busy >= studies.FULL else cell for cell in cells]


def _wait(seconds: float) -> str:
    return figure(seconds) if seconds >= 0.01 else "< 0.01"
