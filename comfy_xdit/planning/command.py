"""`python -m comfy_xdit plan`: the candidates for a model and a picture, and which one `auto` takes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from comfy_xdit.planning import cluster, planner
from comfy_xdit.planning.cluster import Cluster
from comfy_xdit.planning.measured import Measured
from comfy_xdit.planning.planner import Candidate, Plan, figure, short
from comfy_xdit.planning.published import PUBLISHED
from comfy_xdit.planning.request import ModelShape, Request
from comfy_xdit.protocol.errors import InvalidInput, counted
from comfy_xdit.protocol.spec import ModelSpec

# What ComfyUI's own latents take, in pixels; an element of a latent is 8 of them.
SMALLEST_SIDE, LARGEST_SIDE, PIXELS = 16, 16384, 8
MOST = {"steps": 10000, "batch": 4096}
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
        InvalidInput: no such model, family or cluster, or a size that no picture has.
    """
    _check(size)
    named = _named(family) if model is None else None
    spec = None if model is None else ModelSpec.of(model, "transformer")
    where = cluster.parse(devices) if devices else this_machine()
    request = _request(spec, named, where, {k: v for k, v in size.items() if v is not None})
    chosen = planner.plan(request, where, Measured.load(), pipefusion)
    yield (
        f"{request.shape.family}, {request.shape.parameters / 1e9:.3g} billion parameters, "
        f"{request.image_tokens} + {request.text_tokens} tokens, {counted(request.rows, 'row')}, "
        f"{counted(request.steps, 'step')}, "
        f"{8 * request.dtype_bytes} bits, on {where.describe()}"
    )
    yield ""
    yield from table(chosen, request.steps, None if every else SHOWN)
    yield ""
    yield f"pick: {chosen.pick.layout.describe()}: {chosen.why}"
    if pipefusion:
        yield "PipeFusion's image differs a little after its warm-up steps: auto never takes it."


def _check(size: dict[str, Any]) -> None:
    for name in ("width", "height"):
        side = size[name]
        if not SMALLEST_SIDE <= side <= LARGEST_SIDE or side % PIXELS:
            near = min(max(SMALLEST_SIDE, round(side / PIXELS) * PIXELS), LARGEST_SIDE)
            raise InvalidInput(
                f"{name} is {side} pixels; a side has {SMALLEST_SIDE} to {LARGEST_SIDE}, in steps of "
                f"{PIXELS}. Set --{name} to {near}."
            )
    for name, most in MOST.items():
        if not 1 <= size[name] <= most:
            raise InvalidInput(f"{name} is {size[name]}; set --{name} between 1 and {most}.")


def _named(family: str) -> ModelShape:
    if family not in PUBLISHED:
        raise InvalidInput(
            f"family {family!r} is not one of {', '.join(PUBLISHED)}; choose one of them, or name a file "
            "with --model."
        )
    return PUBLISHED[family]


def _request(
    spec: ModelSpec | None, named: ModelShape | None, where: Cluster, size: dict[str, Any]
) -> Request:
    if spec is None:
        return Request.picture(named, dtype_bytes=4 if where.device.kind == "cpu" else 2, **size)
    from comfy_xdit.planning.auto import description, dtype_bytes  # a rank reads the file

    told = description(spec)
    bytes_ = dtype_bytes(told, spec, where.device.kind)
    return Request.picture(ModelShape.of(told), dtype_bytes=bytes_, **size)


def this_machine() -> Cluster:
    """The cluster of all devices here. Imports torch, which a plan for described ones does not need."""
    from comfy_xdit.planning.auto import machine
    from comfy_xdit.protocol.parallel import available_devices

    return machine(available_devices())


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


def outline(where: Cluster) -> Iterator[tuple[str, bool]]:
    """For doctor: what `auto` takes there for published models, and whether that fits the memory."""
    for name in PUBLISHED:
        chosen = planner.plan(_request(None, _named(name), where, {}), where, Measured.load())
        yield (
            f"strategy auto, {name} at 1024 x 1024: {short(chosen.pick)}: {chosen.why}",
            chosen.pick.prediction.fits,
        )
