"""Times and memory of one model on the device, everything in turns within one run."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from benchmarks.gpu.shapes import Call, Shape
from comfy_xdit.protocol.messages import Forget, Status
from comfy_xdit.protocol.parallel import ParallelConfig
from comfy_xdit.protocol.spec import ModelSpec
from comfy_xdit.ranks.registry import worker_group
from comfy_xdit.remote.model import RemoteModel
from tests.tiny import relative_l2
from worker.parallel import Mesh, SpreadTokens

WARM = 2  # turns that do not count


@dataclass(frozen=True)
class Row:
    """What was measured of one model; seconds are medians, ratios medians of the turns' ratios.

    Args:
        plain: of a step in plain diffusers; `seam`: what its time is of one with its attention caught.
        rank, ratio, bridge: of a step in one rank as the host waits for it; plain's time to that; what of it
            is the bridge.
        load, bytes: seconds from a file that was just written to ready weights, and how many bytes.
        peak: bytes that a rank's call takes beside the weights; None where nobody counts.
        difference: relative L2 of the rank's output to plain diffusers'.
    """

    name: str
    words: str
    plain: float
    seam: float
    rank: float | None = None
    ratio: float | None = None
    bridge: float | None = None
    load: float | None = None
    bytes: int | None = None
    peak: int | None = None
    difference: float | None = None


def measured(shape: Shape, device: torch.device, turns: int, small: bool) -> Row:
    """One model: the seam, then one rank, which reads its weights from a file."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    module = shape.build(device, dtype, small)
    give_back(device)
    call = Call.of(shape, module, small)
    with torch.inference_mode():
        plain, seam = _seam(shape, module, call, device, turns)
        row = Row(shape.name, shape.words, plain, seam)
        return row if shape.family is None else _rank(row, shape, module, call, device, turns)


def give_back(device: torch.device) -> None:
    """What this process has cached, to the ranks."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def in_turns(
    one: Callable[[], object], other: Callable[[], object], device: torch.device, turns: int
) -> tuple[list[float], list[float]]:
    """Seconds of both, each turn."""
    found: tuple[list[float], list[float]] = ([], [])
    for turn in range(WARM + turns):
        for work, seconds in zip((one, other), found, strict=True):
            began = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn >= WARM:
                seconds.append(time.perf_counter() - began)
    return found


def ratio(one: list[float], other: list[float]) -> float:
    """Median of the turns' ratios."""
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


def _seam(
    shape: Shape, module: nn.Module, call: Call, device: torch.device, turns: int
) -> tuple[float, float]:
    def caught() -> None:
        spread = SpreadTokens(module, shape.plan, Mesh())
        try:
            call.run(module)
        finally:
            spread.close()

    plain, spread = in_turns(lambda: call.run(module), caught, device, turns)
    return statistics.median(plain), ratio(plain, spread)


def _rank(row: Row, shape: Shape, module: nn.Module, call: Call, device: torch.device, turns: int) -> Row:
    layout = ParallelConfig(devices=("cuda:0" if device.type == "cuda" else "cpu",))
    group = worker_group(layout)
    with tempfile.TemporaryDirectory(prefix="comfy_xdit_gpu_") as folder:
        module.save_pretrained(folder)
        size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        weights = "fp32" if device.type == "cpu" else "bf16"
        remote = RemoteModel(ModelSpec.of(Path(folder), "transformer", weights), layout)
        group.call(Status())  # the ranks are up
        began = time.perf_counter()
        remote.load()
        load = time.perf_counter() - began
        bridges: list[float] = []

        def ours() -> torch.Tensor:
            output = remote.denoise(call.x, call.timestep, call.given)
            bridges.append(group.timings["Denoise"].bridge)
            return output

        wanted = shape.family.output(dict(module.config), call.run(module), call.x.to(device, module.dtype))
        difference = relative_l2(ours().cpu(), wanted.to(call.x.dtype).cpu())
        group.call(Status())  # from here on its peak counts
        plain, rank = in_turns(lambda: call.run(module), ours, device, turns)
        status = group.call(Status()).value
        peak = status["peak"] - status["bytes"] if "peak" in status else None
        group.call(Forget())
    return Row(
        row.name, row.words, row.plain, row.seam, statistics.median(rank), ratio(plain, rank),
        statistics.median(bridges), load, size, peak, difference,
    )  # fmt: skip
