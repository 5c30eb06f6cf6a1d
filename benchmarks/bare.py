"""A bare program for `benchmarks.speed`: xfuser's own Flux under torchrun, or plain diffusers in one process.

    torchrun --nproc-per-node 2 -m benchmarks.bare ulysses FOLDER
    torchrun --nproc-per-node 2 -m benchmarks.bare apart FOLDER
    python -m benchmarks.bare one FOLDER

With `apart` every process draws the whole picture with plain diffusers and they wait for each other at the
end only: what so many processes can get out of this machine at most.

FOLDER holds `transformer/` (a diffusers folder), `call.pt` (arguments of the transformer: tokens, prompt,
positions), and by method a folder with a named pipe `go.RANK` per rank and one `done`. A number in the
pipes `go.RANK` runs an Euler loop of so many steps; rank 0 answers with the seconds it took, and leaves
the last tokens in `last.pt`. Of comfy_xdit it uses only the shims with which xfuser imports without CUDA.
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from diffusers import FluxTransformer2DModel
from torch import nn

SEED = 1


def bare_xfuser(folder: Path, method: str, text: int) -> nn.Module:
    """xfuser's wrapper of the transformer, in every rank of a torchrun job."""
    from worker.parallel import xfuser_compat

    xfuser_compat.import_xfuser()
    from xfuser import xFuserArgs
    from xfuser.core import distributed
    from xfuser.model_executor.models.transformers.transformer_flux import xFuserFlux1Transformer2DWrapper

    degree = int(os.environ["WORLD_SIZE"])
    ulysses, ring = (degree, 1) if method == "ulysses" else (1, degree)
    distributed.init_distributed_environment(backend="gloo", local_rank=int(os.environ["LOCAL_RANK"]))
    distributed.initialize_model_parallel(
        sequence_parallel_degree=degree, ulysses_degree=ulysses, ring_degree=ring, backend="gloo"
    )
    plain = FluxTransformer2DModel.from_pretrained(folder)
    wrapper = xFuserFlux1Transformer2DWrapper.from_config(plain.config)
    wrapper.load_state_dict(plain.state_dict(), assign=True)
    config, _ = xFuserArgs(
        model="bare",
        ulysses_degree=ulysses,
        ring_degree=ring,
        attention_backend="SDPA" if ring == 1 else "SDPA_FLASH",
    ).create_config()
    config.runtime_config.dtype = torch.float32
    pipeline = type("FluxPipeline", (SimpleNamespace,), {})(transformer=wrapper, vae_scale_factor=8)
    distributed.initialize_runtime_state(pipeline, config)
    distributed.get_runtime_state().max_condition_sequence_length = text
    distributed.get_runtime_state().split_text_embed_in_sp = True
    return wrapper


def loop(transformer: nn.Module, call: dict[str, Any], steps: int) -> torch.Tensor:
    """Euler's method from sigma 1 to 0; returns the last tokens."""
    x = call["hidden_states"]
    sigmas = torch.linspace(1.0, 0.0, steps + 1)
    for sigma, following in itertools.pairwise(sigmas):
        arguments = {**call, "hidden_states": x, "timestep": sigma.expand(x.shape[0])}
        (velocity,) = transformer(**arguments, return_dict=False)
        x = x + (following - sigma) * velocity
    return x


def main() -> None:
    """Serve loops until the pipe is closed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("method", choices=("one", "apart", "ulysses", "ring"))
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    rank, folder = int(os.environ.get("RANK", 0)), arguments.folder
    call = torch.load(folder / "call.pt")
    if arguments.method == "apart":
        dist.init_process_group("gloo")
    if arguments.method in ("one", "apart"):
        transformer = FluxTransformer2DModel.from_pretrained(folder / "transformer")
    else:
        text = call["encoder_hidden_states"].shape[1]
        transformer = bare_xfuser(folder / "transformer", arguments.method, text)
    transformer.eval().requires_grad_(False)
    pipe = folder / arguments.method
    with torch.no_grad(), (pipe / f"go.{rank}").open() as go:
        for line in go:
            began = time.perf_counter()
            last = loop(transformer, call, int(line))
            if arguments.method == "apart":
                dist.barrier()
            seconds = time.perf_counter() - began
            if rank == 0:
                torch.save(last, pipe / "last.pt")
                (pipe / "done").write_text(f"{seconds}\n")


if __name__ == "__main__":
    main()
