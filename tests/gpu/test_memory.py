"""What ranks hold of a GPU's memory, against what their weights are; and what a lack of it does."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from comfy_xdit.protocol.errors import OutOfDeviceMemory
from comfy_xdit.protocol.messages import Forget, Status
from comfy_xdit.protocol.parallel import ParallelConfig
from comfy_xdit.protocol.spec import ModelSpec
from comfy_xdit.ranks.registry import worker_group
from comfy_xdit.remote.model import RemoteModel
from tests import tiny
from tests.gpu.device import DEVICE, HAS_GPU, here, inputs
from worker.models.flux.family import Flux

pytestmark = pytest.mark.skipif(
    not HAS_GPU, reason="a GPU's memory is counted; of CPU ranks nobody counts it"
)

# Blocks of 31 and 75 MB: large against what an allocator rounds up, small against a GPU.
LARGER = tiny.FLUX_CONFIG | {
    "num_layers": 4, "num_single_layers": 8, "attention_head_dim": 128, "num_attention_heads": 8,
    "axes_dims_rope": (16, 56, 56),
}  # fmt: skip
ROUNDING = 0.02  # of what is allocated: blocks of 512 bytes, small tensors beside the weights
WORKSPACE = 96 << 20  # bytes that cuBLAS keeps from its first product on
LEFT = 256 << 20  # bytes that are free once others have taken the rest
TWO = ParallelConfig(ulysses_degree=2)
SHARDED = ParallelConfig(ulysses_degree=2, shard_weights=True)


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> tiny.TinyModel:
    """A model of some hundred megabytes, as a single file in bf16."""
    family, folder = Flux(), tmp_path_factory.mktemp("larger")
    module = tiny.build(family, LARGER).to(torch.bfloat16)
    file = tiny.write_native(family, module, LARGER, folder / "flux.safetensors")
    return tiny.TinyModel(family, LARGER, module, folder, file)


def status(layout: ParallelConfig) -> list[dict]:
    """Of every rank."""
    group = worker_group(layout)
    return [group.call(Status(), ranks=(rank,)).value for rank in range(layout.world_size)]


@pytest.mark.parametrize("parallel", [ParallelConfig(), TWO, SHARDED], ids=lambda p: p.describe())
def test_ranks_hold_their_weights_and_nothing_else(larger, parallel: ParallelConfig):
    layout = here(parallel)
    group = worker_group(layout)
    group.call(Forget())
    before = [rank["allocated"] for rank in status(layout)]
    remote = RemoteModel(ModelSpec.of(larger.file, "transformer"), layout)
    remote.load()
    whole = sum(p.nbytes for p in larger.module.parameters())
    for start, rank in zip(before, status(layout), strict=True):
        assert rank["allocated"] - start == pytest.approx(rank["bytes"], rel=ROUNDING)
        if not parallel.shard_weights:
            assert rank["bytes"] == whole
        else:  # half of the blocks, two buffers of the largest, and what is outside of the blocks
            assert 0.5 * whole < rank["bytes"] < 0.85 * whole
    loaded = [rank["allocated"] for rank in status(layout)]
    for _ in range(3):
        remote.denoise(*inputs(larger))
    now = status(layout)
    kept = [rank["allocated"] - was - rank["tensors"] for was, rank in zip(loaded, now, strict=True)]
    assert max(kept) <= WORKSPACE, "a call leaves nothing but the prompt"
    del remote
    gc.collect()
    group.call(Forget())
    left = [rank["allocated"] - start for start, rank in zip(before, status(layout), strict=True)]
    assert max(left) <= WORKSPACE, "what is forgotten is gone"


def test_the_most_that_a_call_takes_is_its_activations(larger):
    """And not a copy of the weights: sharded blocks are gathered in place, nothing is cast in a call."""
    layout = here(ParallelConfig())
    remote = RemoteModel(ModelSpec.of(larger.file, "transformer"), layout)
    for _ in range(2):  # the first one loads
        remote.denoise(*inputs(larger))
        (rank,) = status(layout)
    assert rank["peak"] - rank["allocated"] <= 64 << 20


@contextmanager
def taken() -> Iterator[None]:
    """The GPU's memory, but for LEFT, by this process."""
    free, _ = torch.cuda.mem_get_info(DEVICE)
    held = torch.empty(free - LEFT, dtype=torch.uint8, device=DEVICE)
    try:
        yield
    finally:
        del held
        torch.cuda.empty_cache()


@pytest.mark.parametrize("side", [1024, 2048], ids=["in the call", "of the message"])
@pytest.mark.parametrize("parallel", [ParallelConfig(), TWO], ids=lambda p: p.describe())
def test_out_of_memory_is_said_and_the_next_call_is_right(tiny_models, parallel: ParallelConfig, side: int):
    model, layout = tiny_models["flux"], here(parallel)
    remote = RemoteModel(ModelSpec.of(model.file, "transformer", "bf16"), layout)
    before = remote.denoise(*inputs(model))
    pids = worker_group(layout).pids
    huge = torch.zeros(1, 16, side, side)  # 64 or 256 MB, and four times that in the widest layers
    given = tiny.conditions(model.family, model.config, 33)
    with taken(), pytest.raises(OutOfDeviceMemory, match="shard_weights"):
        remote.denoise(huge, torch.full((1,), 0.7), given)
    assert torch.equal(remote.denoise(*inputs(model)), before)
    if parallel.world_size == 1:
        assert worker_group(layout).pids == pids, "a rank outlives it"
