"""What the plan's hooks and the seam cost a block where there is one rank: part of `make bench`.

Tiny models of diffusers' classes, as they are and with their tokens spread over a mesh of one, take turns
in one process. Nothing is exchanged: the difference is Python around each block and each attention. What
counts is CPU time of the one thread, which waits for nobody.
"""

from __future__ import annotations

import copy
import os
import statistics
import time
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tests.plan_cases import CASES, run
from worker.models.plans.diffusers import PLANS
from worker.parallel import Mesh, Plan, SpreadTokens, scaled_dot_product_attention

LIMIT = 0.1  # ms per block
BLOCKS, TURNS = 12, 200
GRID, TEXT = (1, 8, 8), 8  # tokens
NAMES = ("FLUX.1", "SD3.5 medium", "PixArt", "Wan 2.1 T2V", "Qwen-Image")


def blocks(model: nn.Module, plan: Plan) -> int:
    """How many the plan's regions have."""
    return sum(len(model.get_submodule(name)) for region in plan.regions for name in region.blocks)


def cost(name: str, turns: int = TURNS) -> tuple[int, float, float]:
    """Of a case: its blocks, ms of a block, and ms that the seam adds to it; medians over the turns."""
    case = replace(CASES[name], config=CASES[name].config | {"num_layers": BLOCKS})
    plain, plan = case.build().requires_grad_(False), PLANS[case.family]
    spread, given, count = copy.deepcopy(plain), case.inputs(1, GRID, TEXT), blocks(plain, plan)
    SpreadTokens(spread, plan, Mesh())
    caught, added, alone = F.scaled_dot_product_attention, [], []
    with torch.inference_mode():
        for turn in range(turns + 2):
            F.scaled_dot_product_attention = scaled_dot_product_attention
            before = _seconds(plain, given)
            F.scaled_dot_product_attention = caught
            after = _seconds(spread, given)
            if turn >= 2:  # warm
                added.append(after - before)
                alone.append(before)
    return count, *(1000 * statistics.median(times) / count for times in (alone, added))


def _seconds(model: nn.Module, given: dict[str, Any]) -> float:
    began = time.thread_time()
    run(model, given)
    return time.thread_time() - began


def main() -> None:
    """Print a line per class."""
    torch.set_num_threads(1)
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; ms per block, {TURNS} turns")
    for name in NAMES:
        count, alone, added = cost(name)
        said = "held" if added <= LIMIT else "OVER THE LIMIT"
        print(f"{name:14} {count:3} blocks of {alone:.3f}; the seam adds {added:.3f}; limit {LIMIT}: {said}")


if __name__ == "__main__":
    main()
