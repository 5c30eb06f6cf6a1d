"""What it costs to see whether a node changed the inside of a twin: part of `make bench`.

The check of comfy_xdit/comfy_types/model/original.py, on a transformer of a thousand modules without memory.
It needs no ComfyUI. Every call of the transformer makes the short one, every run the whole one.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable

import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from comfy_xdit.comfy_types.model.original import TRANSFORMER, Original

LIMIT = 0.3  # ms per call, at MODULES
MODULES = 1000
CALLS, RUNS = 1000, 100


def twin() -> nn.Module:
    """FLUX.1's blocks on the meta device, with a function in place of its forward as a real twin has."""
    found = nn.Module()
    with torch.device("meta"):
        transformer = FluxTransformer2DModel()
    object.__setattr__(transformer, "forward", lambda *_: None)
    found.add_module(TRANSFORMER, transformer)
    return found


def milliseconds(call: Callable[[], None], times: int) -> float:
    """Median."""
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return 1000 * statistics.median(taken)


def main() -> None:
    """Print both."""
    model = twin()
    modules = sum(1 for _ in model.modules()) - 1
    original = Original(model.get_submodule(TRANSFORMER))
    short = milliseconds(lambda: original.refuse_changes(model), CALLS) * MODULES / modules
    whole = milliseconds(lambda: original.refuse_changes(model, whole=True), RUNS) * MODULES / modules
    said = "held" if short <= LIMIT else "OVER THE LIMIT"
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; {modules} modules, ms per {MODULES}")
    print(f"{short:.3f} per call, limit {LIMIT}: {said}; {whole:.3f} once per run")


if __name__ == "__main__":
    main()
