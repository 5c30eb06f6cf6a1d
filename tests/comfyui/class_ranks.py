"""One of four ranks that compare every case of ComfyUI's classes over ranks with itself on one.

Usage: python -m tests.comfyui.class_ranks [--cases NAME ...], with COMFYUI_DIR set and tests/comfyui/shim on
PYTHONPATH; it starts its ranks itself. Prints JSON: by case and layout the worst relative L2 of a call, or
why there is none; "deaf" is that of a call in which ranks leave out each other's keys.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from typing import Any

import torch
import torch.distributed as dist

from comfy_xdit.protocol.spec import HostComfyUI
from tests.comfyui.families_table import ABSENT
from tests.plan_ranks import WORLD, error, meshes
from tests.rank_programs import found_by_ranks
from worker.models.comfyui.cases import CASES, Case, Draw
from worker.models.comfyui.installation import import_comfyui
from worker.parallel.mesh import Mesh
from worker.parallel.plan import Plan, PlanMismatch

CPU = torch.device("cpu")
LAYOUTS = ("ulysses 2", "ring 2", "ulysses 2 x ring 2")
EXACT = 1e-5  # relative L2
# What a class raises where something does not fit it: on all ranks alike, or the others wait until SECONDS.
FAILURES = (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError)
SECONDS = 900
BATCHES = (1, 2)
Numbers = dict[str, float | str]


def measured(names: list[str] | None = None) -> dict[str, Numbers]:
    """Numbers of every case, or of some, from ranks that it starts and ends."""
    which = ["--cases", *names] if names else []
    return found_by_ranks("tests.comfyui.class_ranks", WORLD, SECONDS, *which)


def call(model: Any, case: Case, batch: int, spread: Any = None) -> list[torch.Tensor]:
    """One call of the whole model."""
    args, kwargs = case.call(Draw(batch))
    if spread is not None and "control" in kwargs:
        kwargs["control"] = spread.residuals(kwargs["control"])
    # What samplers put there, and classes read.
    options = {"sigmas": torch.tensor([0.5]), "sample_sigmas": torch.tensor([1.0, 0.5, 0.0])}
    return case.outputs(model, *args, **kwargs, transformer_options=options)


def right_plan(model: Any, case: Case, wanted: dict[int, list[torch.Tensor]], mesh: Mesh) -> Plan | str:
    """The first of its class's that is right, as the ranks choose it; else the last. Or why it has none."""
    from worker.models.comfyui.spreading import candidates

    try:
        plans = candidates(case.name)
    except PlanMismatch as why:
        return str(why)
    for plan in plans:
        off = compared(model, case, wanted, plan, mesh)
        if not isinstance(off, str) and off <= EXACT:
            break
    return plan


def compared(
    model: Any,
    case: Case,
    wanted: dict[int, list[torch.Tensor]],
    plan: Plan | str,
    mesh: Mesh,
    deaf: bool = False,
) -> float | str:
    """How far a model over ranks is off `wanted` of one, by batch: at the worst of them."""
    from worker.models.comfyui.spreading import Spread

    if isinstance(plan, str):
        return plan
    try:
        spread = Spread(model, plan, mesh, deaf=deaf)
    except PlanMismatch as why:
        return str(why)
    try:
        got = {batch: call(model, case, batch, spread) for batch in wanted}
    except (PlanMismatch, *FAILURES) as why:
        return f"{type(why).__name__}: {why}"
    finally:
        spread.close()
    return max(error(got[batch], wanted[batch]) for batch in wanted)


def measure(names: list[str], rank: int) -> dict[str, Numbers]:
    """Of every case on the meshes of this rank; each pair has every second one."""
    from worker.models.comfyui.cases.models import tiny_model

    found: dict[str, Numbers] = {}
    every = meshes(rank)
    for number, name in enumerate(names):
        case = CASES[name]
        try:
            model, _ = tiny_model(case, CPU)
        except (ImportError, AttributeError, TypeError):
            found[name] = dict.fromkeys((*LAYOUTS, "deaf"), ABSENT)
            continue
        wanted = {batch: call(model, case, batch) for batch in case.batches if batch in BATCHES}
        mine = [layout for layout in LAYOUTS if every[layout].ranks == WORLD or number % 2 == rank // 2]
        plan = right_plan(model, case, wanted, every["ulysses 2 x ring 2"])
        found[name] = {layout: compared(model, case, wanted, plan, every[layout]) for layout in mine}
        if number % 2 == rank // 2:
            one = dict([next(iter(wanted.items()))])
            found[name]["deaf"] = compared(model, case, one, plan, every["ulysses 2"], deaf=True)
    return found


def main() -> None:
    """A rank, or what starts them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("rank", type=int, nargs="?")
    parser.add_argument("file", nargs="?", help="that all ranks meet at")
    arguments = parser.parse_args()
    if arguments.rank is None:
        print(json.dumps(measured(arguments.cases), indent=1))
        return
    torch.set_num_threads(1)
    sys.path.append(os.path.realpath(os.environ["COMFYUI_DIR"]))
    version = importlib.import_module("comfyui_version").__version__
    import_comfyui(HostComfyUI(sys.path[-1], version), CPU)
    meeting = f"file://{arguments.file}"
    dist.init_process_group("gloo", init_method=meeting, rank=arguments.rank, world_size=WORLD)
    with torch.inference_mode():
        found = measure(arguments.cases, arguments.rank)
    every: list[Any] = [None] * WORLD
    dist.all_gather_object(every, found)
    if arguments.rank == 0:
        print(json.dumps({name: every[0][name] | every[2][name] for name in found}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
