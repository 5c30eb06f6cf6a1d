"""Weights that stay packed: their numbers, what operations make of them, and their parts in several ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests import gguf_files
from worker.models.comfyui.packed import PackedWeight, declare, packed_types
from worker.parallel import ShardedWeights

SHAPE = (12, 512)


def weight(kind: str, dtype: torch.dtype = torch.float32) -> tuple[PackedWeight, torch.Tensor]:
    """A packed weight, and its numbers as the gguf package unpacks them."""
    blocks = gguf_files.packed(torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)), kind)
    packed = PackedWeight(torch.from_numpy(blocks), kind, SHAPE, dtype)
    return packed, gguf_files.unpacked(blocks, kind, SHAPE)


def test_every_published_type_can_be_unpacked():
    assert set(gguf_files.PACKED) == set(packed_types())


@pytest.mark.parametrize("kind", gguf_files.PACKED)
def test_the_numbers_are_those_of_the_gguf_package(kind):
    packed, numbers = weight(kind)
    assert torch.isfinite(numbers).all() and numbers.abs().max() > 0.1
    assert torch.equal(packed.unpacked(), numbers)
    half, _ = weight(kind, torch.bfloat16)
    assert torch.equal(half.unpacked(), numbers.bfloat16())


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_it_is_a_parameter_like_any_other(mode):
    with mode():
        packed, numbers = weight("Q4_K")
        layer = nn.Linear(512, 12, bias=False).requires_grad_(False)
        layer.weight = nn.Parameter(packed, requires_grad=False)
        x = torch.randn(3, 512)
        assert isinstance(layer.weight, PackedWeight) and layer.weight.dtype == torch.float32
        assert torch.equal(layer(x), nn.functional.linear(x, numbers))
        assert torch.equal(layer.weight.T @ torch.ones(12), numbers.T @ torch.ones(12))
        assert torch.equal(layer.weight[3:5] + 1, numbers[3:5] + 1)
        assert torch.equal(nn.functional.linear(x.bfloat16(), layer.weight.to(torch.bfloat16)),
                           nn.functional.linear(x.bfloat16(), numbers.bfloat16()))  # fmt: skip
        assert layer.state_dict()["weight"].shape == SHAPE
        assert layer.weight.nbytes == packed.blocks.nbytes == 12 * 512 // 256 * 144


def test_it_keeps_its_blocks_and_takes_no_numbers():
    packed, numbers = weight("Q8_0")
    copy = packed.to(torch.bfloat16).clone()
    assert isinstance(copy, PackedWeight) and copy.blocks.data_ptr() != packed.blocks.data_ptr()
    assert torch.equal(copy.unpacked(), numbers.bfloat16())
    empty = torch.empty_like(packed).copy_(packed)
    assert torch.equal(empty.unpacked(), numbers)
    with pytest.raises(TypeError, match="cannot be written"):
        packed.copy_(numbers)


def test_a_change_is_made_whenever_it_is_unpacked():
    packed, numbers = weight("Q5_1")
    packed.change = lambda whole: whole.add_(1.0)
    for _ in range(2):
        assert torch.equal(packed + 0.0, numbers + 1.0)
    packed.change = None
    assert torch.equal(packed + 0.0, numbers)


@pytest.mark.parametrize("ranks", [2, 3])
def test_each_rank_keeps_its_part_of_the_blocks(ranks, monkeypatch):
    model = nn.Sequential(*(nn.Linear(512, 12) for _ in range(3))).requires_grad_(False)
    whole = {}
    for number, layer in enumerate(model):
        packed, numbers = weight("Q6_K")
        whole |= {f"{number}.weight": packed, f"{number}.bias": layer.bias.clone()}
    declare(model, whole)
    rows = []
    for rank in range(ranks):
        monkeypatch.setattr(dist, "get_rank", lambda _group, rank=rank: rank)
        shards = ShardedWeights(model, ["0", "1", "2"], ranks, torch.float32)
        shards.attach(model, None, torch.device("cpu"))
        for name, tensor in whole.items():
            shards.write(name, tensor)
        rows.append(shards._parts)
    assert set(shards.names) == set(whole)
    assert shards.whole_nbytes == 3 * (12 * 2 * 210 + 12 * 4)
    for number, parts in enumerate(zip(*rows, strict=True)):
        shards._rows[number].copy_(torch.cat(parts))  # as a gather does
        assert torch.equal(model[number].weight.unpacked(), numbers)
        assert torch.equal(model[number].bias, whole[f"{number}.bias"])
