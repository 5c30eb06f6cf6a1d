"""What a step costs when the host drives, against the same loop inside the ranks: part of `make bench`.

A stock sampler calls the transformer once per step and does the rest on the host (`denoise`);
XDiTSampler has the whole loop in the ranks (`sample`). Both take turns in one run, on a real
transformer: an echo could not run the loop. It is as small as it can be (one layer, two heads of
width 8), so that the difference is not lost in the noise of its own time. The latent is
16 x 64 x 128 in fp32, 512 KiB; the prompt has the 154 x 4096 numbers of SD3, which the host
compares in every step.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from comfy_xdit.protocol.messages import Sample
from comfy_xdit.protocol.parallel import ParallelConfig
from comfy_xdit.protocol.spec import ModelSpec
from comfy_xdit.ranks.registry import worker_group
from comfy_xdit.remote.model import RemoteModel
from tests import tiny
from worker.models.sd3.family import SD3

CONFIG = {
    **tiny.SD3_CONFIG, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8,
    "caption_projection_dim": 16,
    "joint_attention_dim": 4096, "pos_embed_max_size": 96,
}  # fmt: skip
LATENT, TOKENS, MULTIPLIER = (1, 16, 64, 128), 154, 1000.0
STEPS, ROUNDS = 20, 21
RANKS = (1, 2)
Loop = Callable[[], torch.Tensor]


def loops(file: Path, parallel: ParallelConfig) -> dict[str, Loop]:
    """The same Euler loop, driven by the host and by the ranks."""
    remote = RemoteModel(ModelSpec.of(file, "transformer"), parallel)
    noise = torch.randn(LATENT, generator=torch.Generator().manual_seed(1))
    given = tiny.conditions(SD3(), CONFIG, TOKENS)
    sigmas = torch.linspace(1.0, 0.0, STEPS + 1)
    request = Sample(
        remote.spec, "euler", sigmas, torch.zeros_like(noise), noise, 1.0, given, None, sigmas * MULTIPLIER
    )

    def host() -> torch.Tensor:
        x = noise
        for sigma, following in itertools.pairwise(sigmas):
            velocity = remote.denoise(x, (sigma * MULTIPLIER).expand(1), given, interrupted=lambda: False)
            x = x + (following - sigma) * velocity
        return x

    return {"host": host, "ranks": lambda: remote.sample(request, interrupted=lambda: False)}


def measure(file: Path, ranks: int) -> dict[str, float]:
    """Median milliseconds per step of both, of what the host adds, and bytes of one call."""
    parallel = ParallelConfig(ulysses_degree=ranks)
    both = loops(file, parallel)
    times: dict[str, list[float]] = {name: [] for name in both}
    difference = tiny.relative_l2(both["host"](), both["ranks"]())
    assert difference < 1e-5, f"the two loops differ by {difference:.1e}"
    for _ in range(ROUNDS):
        for name, loop in both.items():
            began = time.perf_counter()
            loop()
            times[name].append(1000 * (time.perf_counter() - began) / STEPS)
    added = [host - inside for host, inside in zip(times["host"], times["ranks"], strict=True)]
    call = worker_group(parallel).timings["Denoise"]
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {**medians, "added": statistics.median(added), "sent": call.sent, "received": call.received}


def main() -> None:
    """Measure, print a table, write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("output/steps.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["XDIT_OMP_NUM_THREADS"] = "1"
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; median ms per step")
    print(
        f"{'ranks':>5}{'host drives':>13}{'loop in ranks':>15}{'added':>8}{'sent':>10}{'received':>10} bytes"
    )
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        file = tiny.write_native(SD3(), tiny.build(SD3(), CONFIG), CONFIG, Path(folder) / "sd3.safetensors")
        for ranks in RANKS:
            row = results[ranks] = measure(file, ranks)
            print(
                f"{ranks:>5}{row['host']:>13.2f}{row['ranks']:>15.2f}{row['added']:>8.2f}"
                f"{row['sent']:>10}{row['received']:>10}"
            )
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
