"""A VAE on two ranks against one: seconds, and the peak of activation memory per rank. Part of `make bench`.

The VAE of SD3 and FLUX.1 at its real size with random weights, fp32 on CPU, one thread per rank.
Both groups take turns in one run. The peak is counted exactly: every storage that an operation
makes, while it lives (benchmarks/vae_rank.py); weights, which every rank holds whole, are not in it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from comfy_xdit.protocol.messages import Decode, Encode
from comfy_xdit.protocol.parallel import ParallelConfig
from comfy_xdit.protocol.spec import ModelSpec
from comfy_xdit.ranks.group import WorkerGroup
from tests import vaes
from tests.tiny import relative_l2

LEVELS = 4
COMPRESSION = 8


def configuration(width: int) -> dict[str, Any]:
    """AutoencoderKL of SD3 and FLUX.1, whose width is 128."""
    return vaes.CONFIGS["AutoencoderKL"] | {
        "block_out_channels": (width, 2 * width, 4 * width, 4 * width),
        "down_block_types": ("DownEncoderBlock2D",) * LEVELS,
        "up_block_types": ("UpDecoderBlock2D",) * LEVELS,
        "layers_per_block": 2,
    }


def measure(spec: ModelSpec, side: int, rounds: int) -> dict[str, dict[int, dict[str, float]]]:
    """Median seconds and peak bytes by work and number of ranks."""
    groups = {n: WorkerGroup(ParallelConfig(ulysses_degree=n), "benchmarks.vae_rank") for n in (1, 2)}
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(1, 16, side // COMPRESSION, side // COMPRESSION, generator=generator)
    pixels = torch.rand(1, 3, side, side, generator=generator) * 2 - 1
    small = latent[..., :COMPRESSION, :COMPRESSION].contiguous()
    results: dict[str, dict[int, dict[str, float]]] = {}
    try:
        for work, message in (("decode", Decode(spec, latent)), ("encode", Encode(spec, pixels))):
            seconds: dict[int, list[float]] = {n: [] for n in groups}
            answers = {}
            for group in groups.values():
                group.call(Decode(spec, small))
            for _ in range(rounds):
                for n, group in groups.items():
                    result = group.call(message)
                    seconds[n].append(result.seconds)
                    answers[n] = result.value
            one, two = (answers[n]["pixels" if work == "decode" else "latent"] for n in groups)
            difference = relative_l2(two, one)
            assert difference < 1e-5, f"{work} on two ranks differs by {difference:.1e}"
            results[work] = {
                n: {"seconds": statistics.median(seconds[n]), "peak": answers[n]["peak"]} for n in groups
            }
    finally:
        for group in groups.values():
            group.close()
    return results


def main() -> None:
    """Measure, print a table, write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=1024, help="of the picture, pixels")
    parser.add_argument("--width", type=int, default=128, help="of the VAE; 128 is the real one")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("output/vae.json"))
    arguments = parser.parse_args()
    os.environ["XDIT_OMP_NUM_THREADS"] = "1"
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; {arguments.side} px")
    print(f"{'':8}{'ranks':>6}{'seconds':>9}{'ratio':>7}{'peak MiB per rank':>19}{'ratio':>7}")
    with tempfile.TemporaryDirectory() as folder:
        vaes.build("AutoencoderKL", configuration(arguments.width)).save_pretrained(folder)
        results = measure(ModelSpec.of(folder, "vae"), arguments.side, arguments.rounds)
    for work, rows in results.items():
        for ranks, row in rows.items():
            faster, smaller = rows[1]["seconds"] / row["seconds"], row["peak"] / rows[1]["peak"]
            print(
                f"{work:8}{ranks:>6}{row['seconds']:>9.1f}{faster:>7.2f}"
                f"{row['peak'] / 2**20:>19.0f}{smaller:>7.2f}"
            )
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
