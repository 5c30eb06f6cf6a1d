"""One of four ranks that compare every case of plan_cases.py spread over ranks with itself on one.

Usage: python -m tests.plan_ranks RANK FILE, a file that all ranks meet at. Rank 0 prints JSON: by case and
layout [worst relative L2, relative L2 of a deaf call, collectives, bytes].
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import torch.distributed as dist

from tests.plan_cases import CASES, FEW_TEXT, Case, run
from worker.models.plans.diffusers import PLANS
from worker.parallel.mesh import Mesh
from worker.parallel.tokens import SpreadTokens

WORLD = 4
EVEN, ODD = (5, 4, 4), (5, 3, 5)


def meshes(rank: int) -> dict[str, Mesh]:
    """Of each layout the mesh that this rank is in. Pairs work apart from each other."""
    pairs = [dist.new_group([first, first + 1]) for first in (0, 2)]
    crossed = [dist.new_group([first, first + 2]) for first in (0, 1)]
    pair, in_pair = pairs[rank // 2], rank % 2
    return {
        "ulysses 2": Mesh(2, 1, in_pair, pair, None, pair),
        "ring 2": Mesh(1, 2, in_pair, None, pair, pair),
        "ulysses 2 x ring 2": Mesh(2, 2, rank, pair, crossed[rank % 2], dist.group.WORLD),
        "ulysses 4": Mesh(4, 1, rank, dist.group.WORLD, None, dist.group.WORLD),
    }


def error(got: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    """The worst relative L2."""
    assert all(bool(w.isfinite().all()) and float(w.norm()) > 0 for w in wanted)
    return max(float((g - w).norm() / w.norm()) for g, w in zip(got, wanted, strict=True))


def measure(case: Case, mesh: Mesh) -> list[float]:
    """[relative L2, deaf, collectives, bytes] of one case."""
    model, plan = case.build(), PLANS[case.family]
    inputs = [case.inputs(batch, grid, 7 + (grid == EVEN)) for grid in (EVEN, ODD) for batch in (1, 2)]
    if case.short:
        inputs.append(case.inputs(2, ODD, FEW_TEXT))
    wanted = [run(model, given) for given in inputs]
    spread = SpreadTokens(model, plan, mesh)
    worst = error(run(model, inputs[0]), wanted[0])
    traffic = [mesh.traffic.collectives, mesh.traffic.sent]
    worst = max(worst, *(error(run(model, g), w) for g, w in zip(inputs[1:], wanted[1:], strict=True)))
    spread.close()
    if not any(plan_region.attention for plan_region in plan.regions):
        return [worst, 1.0, *traffic]  # no keys to leave out
    deaf = SpreadTokens(model, plan, mesh, deaf=True)
    difference = error(run(model, inputs[0]), wanted[0])
    deaf.close()
    return [worst, difference, *traffic]


def main(rank: int, file: str) -> None:
    """Measure all cases; each pair has every second one."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=WORLD)
    found: dict[str, Any] = {}
    with torch.inference_mode():
        for layout, mesh in meshes(rank).items():
            for number, (name, case) in enumerate(CASES.items()):
                if mesh.ranks == WORLD or number % 2 == rank // 2:
                    mesh.traffic.collectives = mesh.traffic.sent = 0
                    found[f"{name}, {layout}"] = measure(case, mesh)
    every: list[Any] = [None] * WORLD
    dist.all_gather_object(every, found)
    if rank == 0:
        print(json.dumps(every[0] | every[2]))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
