"""Masks that come to the seam: those it cuts, and those it cannot, which are refused with the remedy."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from worker.parallel.attention.exchange import Exchange, ModuleAttention
from worker.parallel.mesh import Mesh
from worker.parallel.parts import Parts
from worker.parallel.plan import INSTEAD, Attend, Blocks, Plan, PlanMismatch, Region, Tokens
from worker.parallel.tokens import SpreadTokens

TOKENS, HEADS = 6, 2


class Masked(torch.nn.Module):
    """A block whose attention has a mask, or is causal."""

    def __init__(self, mask: torch.Tensor | None = None, causal: bool = False):
        super().__init__()
        self.mask, self.causal = mask, causal

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(x, x, x, attn_mask=self.mask, is_causal=self.causal)


class Model(torch.nn.Module):
    def __init__(self, block: Masked):
        super().__init__()
        self.blocks = torch.nn.ModuleList([block])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks[0](x)


def spread(block: Masked) -> Model:
    """On a mesh of one rank, whose attention is the seam's all the same."""
    model, image = Model(block), Tokens("image", 2)
    region = Region({"blocks": Blocks({"x": image}, (image,))}, {"blocks.*": Attend("image")})
    SpreadTokens(model, Plan((region,)), Mesh())
    return model


@pytest.mark.parametrize(
    "shape",
    [(TOKENS, TOKENS), (HEADS, TOKENS, TOKENS), (1, HEADS, 1, TOKENS), (1, 1, TOKENS, TOKENS)],
    ids=str,
)
def test_a_mask_of_any_shape_that_pytorch_takes(shape: tuple[int, ...]):
    x, mask = torch.randn(1, HEADS, TOKENS, 4), torch.randn(shape)
    torch.testing.assert_close(spread(Masked(mask))(x), scaled_dot_product_attention(x, x, x, mask))


def test_attention_that_is_causal_is_refused_and_the_next_call_is_right():
    x, block = torch.randn(1, HEADS, TOKENS, 4), Masked(causal=True)
    model = spread(block)
    with pytest.raises(PlanMismatch, match=f"causal .* is not split over ranks; {INSTEAD}"):
        model(x)
    block.causal = False
    torch.testing.assert_close(model(x), scaled_dot_product_attention(x, x, x))
    assert torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True).isfinite().all()


def attention(known: torch.Tensor | None = None) -> ModuleAttention:
    """Of two ranks with half of the tokens each; `known` is the whole key mask."""
    parts = Parts(2, 0)
    parts.bring("image", TOKENS)
    exchange = Exchange(parts, Mesh())
    if known is not None:
        exchange.masks["image"] = known
    return exchange.module((Attend("image"),))


def whole(of: ModuleAttention, mask: torch.Tensor) -> torch.Tensor | None:
    return of._whole_mask("image", [of._exchange.parts["image"]], torch.zeros(1, HEADS, 3, 4), mask)


def test_a_mask_of_own_keys_that_nobody_knows_whole_is_refused():
    with pytest.raises(PlanMismatch, match=rf"a mask over 3 keys where there are 6 \(image\); {INSTEAD}"):
        whole(attention(), torch.zeros(1, 1, 1, 3))


def test_a_mask_of_own_keys_for_each_head_is_refused_where_heads_differ():
    """The key mask that is known says nothing of heads."""
    known = torch.tensor([[1, 1, 0, 1, 0, 1]]).bool()
    alike = torch.zeros(1, 1, 1, 3).repeat(1, HEADS, 1, 1)
    assert torch.equal(whole(attention(known), alike), known[:, None, None])
    with pytest.raises(PlanMismatch, match=f"another one for each of 2 heads.*{INSTEAD}"):
        whole(attention(known), torch.arange(HEADS).view(1, HEADS, 1, 1).expand(-1, -1, -1, 3).float())
