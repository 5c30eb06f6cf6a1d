"""What runs in the ranks: as plain data (`status --json`), and in words (XDiTStatus)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from comfy_xdit import __version__
from comfy_xdit.planning.reasons import reasons
from comfy_xdit.protocol.messages import Status
from comfy_xdit.ranks.registry import WorkerGroup, running_groups

UNITS = ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))
ENDED = "  the ranks have ended; the next run starts new ones"
BUSY = "  the ranks are at work; what they hold is said when they are not"


def report(changes: Sequence[str]) -> str:
    """All groups of this process, and what has `changes`d in the ComfyUI around it."""
    return words(status(changes))


def status(changes: Sequence[str], wait: bool = True) -> dict[str, Any]:
    """The same as plain data: numbers of bytes and seconds, names, and sentences.

    Args:
        wait: for the end of a call in progress; without, ranks that work are not asked.
    """
    return {
        "version": __version__,
        "groups": [_group(group, wait) for group in running_groups() if group.pids],
        "changes": list(changes),
    }


def words(told: dict[str, Any]) -> str:
    """What `status` told, for a person."""
    lines = [f"comfy_xdit {told['version']}"]
    if not told["groups"]:
        lines.append("no rank runs; the first xDiT loader starts them")
    for group in told["groups"]:
        lines += _group_in_words(group)
    lines += [f"this ComfyUI differs from those known: {sentence}" for sentence in told["changes"]]
    return "\n".join(lines)


def size(count: int) -> str:
    """Bytes in words: 3.2 MiB."""
    for unit, name in UNITS:
        if abs(count) >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count} bytes"


def _group(group: WorkerGroup, wait: bool) -> dict[str, Any]:
    layout, timings = group.parallel, dict(group.timings)
    state, ranks = "idle", []
    if group.busy and not wait:
        state = "busy"
    else:
        for rank in range(layout.world_size):
            answer = group.tell(Status(), ranks=(rank,))
            if answer is None:
                state, ranks = "ended", []
                break
            ranks.append(answer.value)
    return {
        "layout": layout.describe(),
        "devices": list(layout.devices),
        "pids": group.pids,
        "state": state,
        "start_seconds": group.start_seconds,
        "logs": group.logs,
        "reasons": list(reasons(layout)),
        "ranks": ranks,
        "last": {kind: timing.plain() for kind, timing in timings.items() if kind != Status.__name__},
    }


def _group_in_words(told: dict[str, Any]) -> Iterator[str]:
    count = len(told["devices"])
    yield (
        f"{count} {'ranks' if count > 1 else 'rank'}, {told['layout']}, on {', '.join(told['devices'])}, "
        f"started in {told['start_seconds']:.1f} s"
    )
    if told["logs"]:
        yield f"  {told['logs']}"
    yield from told["reasons"]
    if told["state"] == "ended":
        yield ENDED
        return
    if told["state"] == "busy":
        yield BUSY
    for rank in told["ranks"]:
        yield from _rank(rank)
    for kind, timing in told["last"].items():
        crossed = f"{size(timing['sent'])} sent, {size(timing['received'])} received"
        yield f"  last {kind}: {timing['text']}; {crossed}"


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
