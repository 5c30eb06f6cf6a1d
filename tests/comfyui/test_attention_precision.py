"""`attn_precision`, which HunyuanDiT asks of its attention: stock's functions, and a ring's blocks."""

from __future__ import annotations

import pytest
import torch

from tests.test_ring_precision import heads, off, plain, ring

# On a CPU ComfyUI attends with the second, or as its switches say. PyTorch's, its choice on a GPU, ignores
# what it is told: its kernels have scores in fp32 always.
NAMES = ("attention_basic", "attention_sub_quad", "attention_split", "attention_pytorch")


@pytest.fixture(params=NAMES)
def stock(comfyui, request):
    import comfy.ldm.modules.attention

    function = getattr(comfy.ldm.modules.attention, request.param)

    def attend(*given: torch.Tensor, precision: torch.dtype | None) -> torch.Tensor:
        query, key, value = given
        return function(
            query, key, value, query.shape[1], skip_reshape=True, skip_output_reshape=True,
            attn_precision=precision,
        )  # fmt: skip

    attend.heeds = request.param != "attention_pytorch"
    return attend


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_ring_is_as_exact_as_stock_that_was_told_fp32(stock, dtype):
    given = heads(dtype, 2.5)
    wanted = plain(*given, torch.float64, torch.float64)
    told, untold = (off(stock(*given, precision=precision), wanted) for precision in (torch.float32, None))

    assert off(ring(*given, 2, False), wanted) <= 1.5 * told
    assert untold >= 1.5 * told if stock.heeds else untold == told


def test_in_fp32_it_changes_nothing(stock):
    given = heads(torch.float32, 2.5)
    assert torch.equal(stock(*given, precision=torch.float32), stock(*given, precision=None))
