"""What weight sharding and PipeFusion's stages save: peaks of memory; what sharding costs in time."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import torch

from benchmarks.parity import multiplier
from comfy_xdit.protocol.messages import Sample, Status
from comfy_xdit.protocol.parallel import ParallelConfig
from comfy_xdit.protocol.spec import ModelSpec
from comfy_xdit.ranks.registry import worker_group
from comfy_xdit.remote.model import RemoteModel
from tests import tiny
from worker.models.sd3.family import SD3

# A block is 2.5 % of the model, as in SD3.5 large (2.6 %) and FLUX.1 (2.9 %).
DEEP = tiny.SD3_CONFIG | {"num_layers": 40}
SMALL = DEEP | {"num_layers": 2}
FOUR = DEEP | {"num_layers": 4}  # a block for each stage
LAYOUTS = {
    "Ulysses 2": ParallelConfig(ulysses_degree=2),
    "CFG 2": ParallelConfig(cfg_parallel_degree=2),
    "Ulysses 4": ParallelConfig(ulysses_degree=4),
    "data 2 x Ring 2": ParallelConfig(data_parallel_degree=2, ring_degree=2),
}
STAGES = {f"PipeFusion {n}": ParallelConfig(pipefusion_degree=n) for n in (2, 4)}
CALLS = 7
LATENT, TEXT = (2, 16, 32, 32), 77


def write(folder: Path, name: str, config: dict) -> tiny.TinyModel:
    """A random model as a single file."""
    module = tiny.build(SD3(), config)
    file = tiny.write_native(SD3(), module, config, folder / f"{name}.safetensors")
    return tiny.TinyModel(SD3(), config, module, folder, file)


def call(remote: RemoteModel, model: tiny.TinyModel) -> tuple[float, torch.Tensor]:
    """Seconds of one transformer call, and what it gave."""
    x = torch.randn(LATENT, generator=torch.Generator().manual_seed(1))
    given = tiny.conditions(model.family, model.config, TEXT, LATENT[0])
    began = time.perf_counter()
    output = remote.denoise(x, torch.full((LATENT[0],), 0.7 * multiplier(model)), given)
    return time.perf_counter() - began, output


def loop(remote: RemoteModel, model: tiny.TinyModel) -> None:
    """A step of warm-up and one after it; stages run in whole loops only."""
    noise = torch.randn(LATENT, generator=torch.Generator().manual_seed(1))
    given = tiny.conditions(model.family, model.config, TEXT, LATENT[0])
    sigmas = torch.linspace(1.0, 0.0, 3)
    timesteps = sigmas * multiplier(model)
    remote.sample(
        Sample(remote.spec, "euler", sigmas, torch.zeros(LATENT), noise, 1.0, given, None, timesteps)
    )


def peak(pid: int) -> int:
    """Most bytes of main memory the process ever had."""
    line = next(s for s in Path(f"/proc/{pid}/status").read_text().splitlines() if s.startswith("VmHWM"))
    return int(line.split()[1]) << 10


def load(
    layout: ParallelConfig,
    small: tiny.TinyModel,
    deep: tiny.TinyModel,
    use: Callable[[RemoteModel, tiny.TinyModel], object] = call,
) -> tuple[RemoteModel, list[int]]:
    """The deep model in the ranks, and by how many bytes each grew at its peak.

    From the end of a use of a small model to after two uses of the deep one.
    """
    first = RemoteModel(ModelSpec.of(small.file, "transformer"), layout)
    use(first, small)
    pids = worker_group(layout).pids
    base = [psutil.Process(pid).memory_info().rss for pid in pids]
    remote = RemoteModel(ModelSpec.of(deep.file, "transformer"), layout)
    for _ in range(2):
        use(remote, deep)
    return remote, [peak(pid) - before for pid, before in zip(pids, base, strict=True)]


def held(layout: ParallelConfig, deep: tiny.TinyModel) -> int:
    """Bytes of weights and buffers that a rank counts, the most of all ranks."""
    group, sizes = worker_group(layout), []
    for rank in range(layout.world_size):
        models = group.call(Status(), ranks=(rank,)).value["models"]
        sizes += [told["bytes"] for told in models if told["name"] == deep.file.name]
    return max(sizes)


def rows(small: tiny.TinyModel, deep: tiny.TinyModel) -> Iterator[list[str]]:
    """For each layout: the share a rank keeps, peaks of whole and sharded weights, and the ratio of times."""
    size = deep.file.stat().st_size
    for name, layout in LAYOUTS.items():
        sharded = replace(layout, shard_weights=True)
        (plain, plain_peak), (spread, spread_peak) = (load(one, small, deep) for one in (layout, sharded))
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(CALLS):
            (one, a), (other, b) = call(plain, deep), call(spread, deep)
            assert tiny.relative_l2(b, a) <= 1e-5
            times[0].append(one)
            times[1].append(other)
        whole, shared = (statistics.median(of) for of in times)
        yield [
            name,
            f"{held(sharded, deep) / size:.3f}",
            f"{1 / layout.world_size + 0.1:.3f}",
            f"{max(spread_peak) / size:.3f}",
            f"{max(plain_peak) / size:.3f}",
            f"{1000 * whole:.0f} ms",
            f"{1000 * shared:.0f} ms",
            f"{shared / whole:.2f}",
        ]


def stages(small: tiny.TinyModel, deep: tiny.TinyModel) -> Iterator[list[str]]:
    """For each number of stages: the share a rank keeps, the limit, and the peak growth."""
    size = deep.file.stat().st_size
    for name, layout in STAGES.items():
        _, grown = load(layout, small, deep, loop)
        limit = 1 / layout.pipefusion_degree + 0.1
        yield [name, f"{held(layout, deep) / size:.3f}", f"{limit:.3f}", f"{max(grown) / size:.3f}"]


def main() -> None:
    """Print the tables."""
    torch.set_num_threads(1)
    head = ["layout", "kept", "limit", "peak growth, sharded", "whole", "call, whole", "sharded", "ratio"]
    with tempfile.TemporaryDirectory() as folder:
        small, deep = write(Path(folder), "small", SMALL), write(Path(folder), "deep", DEEP)
        print(f"model file of {deep.file.stat().st_size / 1e6:.0f} MB")
        for line in (head, ["---"] * len(head), *rows(small, deep)):
            print(f"| {' | '.join(line)} |", flush=True)
        print()
        head = ["layout", "kept", "limit", "peak growth"]
        four = write(Path(folder), "four", FOUR)
        for line in (head, ["---"] * len(head), *stages(four, deep)):
            print(f"| {' | '.join(line)} |", flush=True)


if __name__ == "__main__":
    main()
