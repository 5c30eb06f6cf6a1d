"""Bytes each rank sends per step, counted at the process groups, against the table of the xDiT paper.

Source: arXiv 2411.01738, table 1: with S the bytes of one layer's activations (tokens x width), L layers
and N ranks, a step of Ulysses moves 4 S L / N per rank, of Ring 2 S L, of PipeFusion 2 S. The table leaves
out what happens once per step: the gathering of the picture's tokens at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.counted import COUNTS
from comfy_xdit.protocol.messages import ImagePrompt, Sample
from comfy_xdit.protocol.parallel import ParallelConfig
from comfy_xdit.protocol.spec import ModelSpec
from comfy_xdit.ranks.group import WorkerGroup
from tests import tiny
from worker.models.flux.family import Flux

CONFIG = {**tiny.FLUX_CONFIG, "num_layers": 4, "num_single_layers": 8}
LAYERS = CONFIG["num_layers"] + CONFIG["num_single_layers"]
WIDTH = CONFIG["num_attention_heads"] * CONFIG["attention_head_dim"]
SIDE, TEXT = 32, 32  # latent pixels, prompt tokens
TOKENS = (SIDE // 2) ** 2 + TEXT
ACTIVATIONS = TOKENS * WIDTH * 4  # S, in fp32
STEPS, WARMUP = 6, 1


@dataclass(frozen=True)
class Row:
    """Bytes of the busiest rank per step, and what the table says."""

    name: str
    measured: float
    formula: float

    @property
    def ratio(self) -> float:
        """Measured over formula."""
        return self.measured / self.formula


LAYOUTS = {
    "Ulysses 2": (ParallelConfig(ulysses_degree=2), 4 * ACTIVATIONS * LAYERS / 2),
    "Ulysses 4": (ParallelConfig(ulysses_degree=4), 4 * ACTIVATIONS * LAYERS / 4),
    "Ring 2": (ParallelConfig(ring_degree=2), 2 * ACTIVATIONS * LAYERS),
    "Ring 4": (ParallelConfig(ring_degree=4), 2 * ACTIVATIONS * LAYERS),
    "PipeFusion 2": (ParallelConfig(pipefusion_degree=2, warmup_steps=WARMUP), 2 * ACTIVATIONS),
    "PipeFusion 4": (ParallelConfig(pipefusion_degree=4, warmup_steps=WARMUP), 2 * ACTIVATIONS),
}


def per_step(file: Path, parallel: ParallelConfig, pictures: tuple[ImagePrompt, ...] = ()) -> float:
    """Bytes the busiest rank sends in a step: the difference of two runs, without what happens once."""
    with tempfile.TemporaryDirectory() as counts:
        os.environ[COUNTS] = counts
        group = WorkerGroup(parallel, program="benchmarks.counted")
        try:
            few, many = (_run(group, file, steps, Path(counts), pictures) for steps in (WARMUP + 1, STEPS))
        finally:
            group.close()
    return max(b - a for a, b in zip(few, many, strict=True)) / (STEPS - WARMUP - 1)


def _run(
    group: WorkerGroup, file: Path, steps: int, counts: Path, pictures: tuple[ImagePrompt, ...]
) -> list[int]:
    noise = torch.randn(1, 16, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    given = tiny.conditions(Flux(), CONFIG, TEXT)
    sigmas = torch.linspace(1.0, 0.0, steps + 1)
    spec = ModelSpec.of(file, "transformer")
    plain = Sample(spec, "euler", sigmas, torch.zeros_like(noise), noise, 1.0, given, None, sigmas)
    group.call(replace(plain, image_prompts=pictures))
    ranks = range(group.parallel.world_size)
    return [sum(json.loads((counts / f"{rank}.json").read_text()).values()) for rank in ranks]


def measure() -> Iterator[Row]:
    """Every layout."""
    with tempfile.TemporaryDirectory() as folder:
        file = tiny.write_native(
            Flux(), tiny.build(Flux(), CONFIG), CONFIG, Path(folder) / "flux.safetensors"
        )
        for name, (parallel, formula) in LAYOUTS.items():
            yield Row(name, per_step(file, parallel), formula)


def main() -> None:
    """Print a table, write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("output/traffic.json"))
    arguments = parser.parse_args()
    os.environ["XDIT_OMP_NUM_THREADS"] = "1"
    print(f"{TOKENS} tokens of width {WIDTH}, {LAYERS} layers, fp32: S = {ACTIVATIONS} bytes; KiB per step")
    print("| layout | counted | table | ratio |\n|---|---|---|---|")
    rows = []
    for row in measure():
        print(
            f"| {row.name} | {row.measured / 1024:.0f} | {row.formula / 1024:.0f} | {row.ratio:.2f} |",
            flush=True,
        )
        rows.append({"name": row.name, "counted": row.measured, "table": row.formula, "ratio": row.ratio})
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
