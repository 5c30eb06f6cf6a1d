"""The scores of a ring's attention are fp32 in every dtype: what ComfyUI's `attn_precision` asks for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from worker.parallel.attention import seam
from worker.parallel.attention.blockwise import BIAS_ALIGNMENT, Blockwise, aligned
from worker.parallel.attention.exchange import Exchange
from worker.parallel.mesh import Mesh
from worker.parallel.parts import Parts
from worker.parallel.plan import Attend

TOKENS, WIDTH = 70, 64
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]


def heads(dtype: torch.dtype, size: float, device: str = "cpu") -> tuple[torch.Tensor, ...]:
    """Query, key and value; `size` of query and key."""
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(1, 2, TOKENS, WIDTH, generator=generator) for _ in range(3))
    return tuple(tensor.to(device, dtype) for tensor in (query * size, key * size, value))


def plain(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scores: torch.dtype, dtype: torch.dtype
) -> torch.Tensor:
    """Attention in plain words, its scores in one dtype and its sums in another."""
    found = query.to(scores) @ key.to(scores).mT * WIDTH**-0.5
    return found.softmax(-1).to(dtype) @ value.to(dtype)


def ring(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, blocks: int, biased: bool
) -> torch.Tensor:
    result = Blockwise(query, None)
    for span in torch.arange(TOKENS).chunk(blocks):
        bias = query.new_zeros(1, 1, 1, len(span)) if biased else None
        result.add(key[:, :, span], value[:, :, span], bias)
    return result.result


def off(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("blocks", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_as_exact_as_with_scores_in_fp32(dtype: torch.dtype, blocks: int, biased: bool, device: str):
    given = heads(dtype, 2.5, device)
    wanted = plain(*given, torch.float64, torch.float64)
    upcast, rounded = (off(plain(*given, scores, dtype), wanted) for scores in (torch.float32, dtype))

    assert off(ring(*given, blocks, biased), wanted) <= 1.5 * upcast
    assert rounded >= 2 * upcast, "or the figure above would say nothing of scores"


@pytest.mark.parametrize("device", DEVICES)
def test_scores_beyond_fp16_are_no_infinity(device: str):
    given = heads(torch.float16, 60.0, device)
    assert not plain(*given, torch.float16, torch.float16).isfinite().all()
    wanted = plain(*given, torch.float64, torch.float64)

    assert off(ring(*given, 2, False), wanted) <= 1e-2


@pytest.mark.parametrize(("dtype", "called"), [(torch.float32, 0), (torch.float16, 1), (torch.bfloat16, 1)])
def test_a_kernel_of_half_precision_is_not_given_fp32(dtype: torch.dtype, called: int):
    calls = []

    def kernel(query: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(query.dtype)
        return query, query[..., 0]

    query, key, value = heads(dtype, 1.0)
    Blockwise(query, None, kernel).add(key, value, None)
    assert calls == [dtype] * called


def test_ulysses_hands_on_what_a_class_asks_of_its_attention():
    """There one rank sees all keys, and calls ComfyUI's own attention."""
    asked = []

    def original(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **options: Any) -> torch.Tensor:
        asked.append(options.get("attn_precision"))
        return plain(q, k, v, torch.float32, q.dtype)

    parts = Parts(1, 0)
    parts.bring("image", TOKENS)
    attention = Exchange(parts, Mesh()).module((Attend("image"),))
    query, key, value = heads(torch.float16, 1.0)
    seam.begin(attention)
    try:
        seam.catching(original)(query, key, value, 2, skip_reshape=True, attn_precision=torch.float32)
    finally:
        seam.end()
    assert asked == [torch.float32]


@pytest.mark.parametrize("keys", [5, 16, 33])
def test_a_bias_for_a_gpu_is_one_row_of_memory_however_far_it_is_expanded(keys: int):
    bias = torch.arange(float(keys)).expand(1, 1, 1, keys)
    found = aligned(bias).expand(2, 24, 4096, keys)
    assert torch.equal(found[1, 5, 7], bias[0, 0, 0])
    assert found.untyped_storage().nbytes() <= 4 * (keys + BIAS_ALIGNMENT)
    rows = aligned(torch.zeros(1, 1, 3, keys))
    assert all(stride % BIAS_ALIGNMENT == 0 for stride in rows.stride()[:-1]) and rows.stride(-1) == 1
