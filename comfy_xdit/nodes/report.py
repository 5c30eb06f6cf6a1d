"""What runs in the ranks, in words: the report of XDiTStatus."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from comfy_xdit import __version__
from comfy_xdit.planning.reasons import reasons
from comfy_xdit.protocol.messages import Status
from comfy_xdit.ranks.group import WorkerGroup
from comfy_xdit.ranks.registry import running_groups

UNITS = ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))


def report(changes: Sequence[str]) -> str:
    """All groups of this process, and what has `changes`d in the ComfyUI around it."""
    lines = [f"comfy_xdit {__version__}"]
    groups = [group for group in running_groups() if group.pids]
    if not groups:
        lines.append("no rank runs; the first xDiT loader starts them")
    for group in groups:
        lines += _group(group)
    lines += [f"this ComfyUI differs from those known: {sentence}" for sentence in changes]
    return "\n".join(lines)


def size(count: int) -> str:
    """Bytes in words: 3.2 MiB."""
    for unit, name in UNITS:
        if abs(count) >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count} bytes"


def _group(group: WorkerGroup) -> Iterator[str]:
    layout, timings = group.parallel, dict(group.timings)
    plural = "ranks" if layout.world_size > 1 else "rank"
    yield (
        f"{layout.world_size} {plural}, {layout.describe()}, on {', '.join(layout.devices)}, "
        f"started in {group.start_seconds:.1f} s"
    )
    if group.logs:
        yield f"  {group.logs}"
    yield from reasons(layout)
    for rank in range(layout.world_size):
        answer = group.tell(Status(), ranks=(rank,))
        if answer is None:
            yield "  the ranks have ended; the next run starts new ones"
            return
        yield from _rank(answer.value)
    for kind, timing in timings.items():
        if kind != Status.__name__:
            crossed = f"{size(timing.sent)} sent, {size(timing.received)} received"
            yield f"  last {kind}: {timing.describe()}; {crossed}"


def _rank(told: dict[str, Any]) -> Iterator[str]:
    yield (
        f"  rank {told['rank']} (pid {told['pid']}, {told['device']}, torch {told['torch']}, "
        f"xfuser {told['xfuser']}, diffusers {told['diffusers']})"
    )
    memory = f"    memory: {size(told['resident'])} of the machine's"
    if "gpu" in told:
        memory += f", {size(told['gpu'])} of the GPU's {size(told['total'])} ({size(told['free'])} free)"
    yield f"{memory}; models {size(told['bytes'])}, room for {size(max(0, told['room']))} more"
    for model in told["models"]:
        yield f"    {model['name']} ({model['kind']}, {size(model['bytes'])})"
    yield (
        f"    prompts {size(told['tensors'])}, LoRA {size(told['patches'])}; "
        f"{told['loads']} models read from disk since the start"
    )
