"""`bench`: what one rank and several do on this machine, in a minute, kept for the planner."""

from __future__ import annotations

import math
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from comfy_xdit.bench.chart import bars
from comfy_xdit.planning.timed import Reference, Timed, here, layouts, speedups, table
from comfy_xdit.protocol.messages import Sample
from comfy_xdit.protocol.parallel import ParallelConfig, available_devices
from comfy_xdit.protocol.spec import ModelSpec
from comfy_xdit.remote import RemoteModel

LOOPS = 3  # of a layout: the first warms up and does not count
CFG = 3.0
PLOT = "bench.png"


def run(output: Path, budget: float) -> None:
    """Time the layouts, print a table, write a plot; the times are remembered on the way.

    Args:
        output: folder of the plot; it is there.
        budget: seconds after which no further layout is begun.
    """
    where, reference = here()
    plain = reference.request(guided=False)
    print(f"{where.describe()}; random weights, {reference.shape.parameters / 1e6:.0f} million parameters")
    print(f"{plain.image_tokens} + {plain.text_tokens} tokens, {8 * plain.dtype_bytes} bits; about a minute")
    began, timed = time.monotonic(), []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "bench.safetensors"
        write_model(reference, file)
        for layout, guided in layouts(where, reference):
            if timed and time.monotonic() - began > budget:
                print(f"{layout.describe()} is left out: the {budget:g} s are over (more: --seconds)")
                continue
            timed.append(Timed(layout, guided, _seconds(file, layout, guided, reference)))
            print(timed[-1].describe(), flush=True)
    print(*table(timed, reference, where), sep="\n")
    if found := speedups(timed):
        bars("speed-up over one rank, measured", found, output / PLOT, line=1.0)
        print(f"wrote {output / PLOT}")
    print("These times now correct the plans for this machine: strategy auto, and the command plan.")


def write_model(reference: Reference, file: Path) -> None:
    """Write a safetensors file with random weights at a scale where every layer matters."""
    generator = torch.Generator().manual_seed(0)
    dtype = torch.float32 if reference.dtype_bytes == 4 else torch.bfloat16
    tensors = {}
    for name, shape in reference.weights():
        scale = 0.5 / math.sqrt(shape[-1]) if len(shape) > 1 else 0.1
        tensors[name] = (torch.randn(shape, generator=generator) * scale).to(dtype)
    save_file(tensors, file)


def _seconds(file: Path, layout: ParallelConfig, guided: bool, reference: Reference) -> float:
    """The least seconds of a step. RemoteModel remembers each loop but the first (planning/calls.py)."""
    layout = replace(layout, devices=available_devices()[: layout.world_size])
    remote = RemoteModel(ModelSpec.of(file, "transformer"), layout)
    latent = remote.described().latent
    generator, side = torch.Generator().manual_seed(1), reference.side // latent.compression
    noise = torch.randn(1, latent.channels, side, side, generator=generator)
    prompt = {name: torch.randn(shape, generator=generator) for name, shape in reference.prompt().items()}
    sigmas = torch.linspace(1.0, 0.0, reference.steps + 1)
    request = Sample(
        remote.spec, "euler", sigmas, torch.zeros_like(noise), noise, CFG if guided else 1.0,
        prompt, prompt if guided else None, sigmas,
    )  # fmt: skip
    times = []
    for _ in range(LOOPS):
        began = time.perf_counter()
        remote.sample(request)
        times.append((time.perf_counter() - began) / reference.steps)
    return min(times[1:])
