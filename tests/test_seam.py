"""Hooks and the seam on small models: what a plan says is done, and what it lacks is an error."""

from __future__ import annotations

import pytest
import torch

from worker.parallel.attention.blockwise import Blockwise
from worker.parallel.attention.exchange import Exchange
from worker.parallel.mesh import Mesh
from worker.parallel.parts import Parts
from worker.parallel.plan import (
    Attend,
    Blocks,
    Named,
    Plan,
    PlanMismatch,
    Prefix,
    Region,
    Tokens,
    Voxels,
)
from worker.parallel.tokens import SpreadTokens


class Block(torch.nn.Module):
    """A block that attends to nobody."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList([Block()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks[0](x)


def plan(same: str = "", **blocks) -> Plan:
    cut = {"x": Tokens("image")}
    region = Region({"blocks": Blocks(cut, ("image",), **blocks)}, same=frozenset(same.split()))
    return Plan((region,))


def test_an_attention_that_does_not_come_to_the_seam_is_an_error():
    region = Region({"blocks": Blocks({"x": Tokens("image")}, ("image",))}, {"blocks.*": Attend("image")})
    model = Model()
    SpreadTokens(model, Plan((region,)), Mesh())
    with pytest.raises(PlanMismatch, match="no attention of Block in Model came to the seam"):
        model(torch.zeros(1, 4, 2))


def test_an_argument_that_the_plan_does_not_know_is_an_error():
    class Wider(Block):
        def forward(self, x, table=None):
            return x

    model = Model()
    model.blocks[0] = Wider()
    with pytest.raises(PlanMismatch, match="takes table, which its plan does not know"):
        SpreadTokens(model, plan(), Mesh())
    SpreadTokens(model, plan("table"), Mesh())


@pytest.mark.parametrize(("added", "kept"), [(False, torch.bool), (True, torch.float32)])
def test_a_mask_of_numbers_is_what_its_plan_says(added: bool, kept: torch.dtype):
    """1.0 and 0.0 say which keys count, unless the plan says that they are added to the scores."""

    class Masked(Block):
        def forward(self, x, mask):
            return x

    class MaskedModel(Model):
        def forward(self, x, mask):
            return self.blocks[0](x, mask)

    model = MaskedModel()
    model.blocks[0] = Masked()
    tables = {"mask": Tokens("image", masks_keys=True, added=added)}
    region = Region({"blocks": Blocks({"x": Tokens("image")}, ("image",))}, {}, tables)
    spread = SpreadTokens(model, Plan((region,)), Mesh())
    model(torch.zeros(1, 3, 2), torch.tensor([[1.0, 1.0, 0.0]]))
    assert spread.exchange.masks["image"].dtype == kept


@pytest.mark.parametrize("kept", [torch.bool, torch.float32])
def test_a_mask_of_all_streams_is_taken_as_it_is(kept: torch.dtype):
    """The model made one of its own tokens of it, in the dtype it computes in."""
    parts = Parts(2, 0)
    parts.bring("image", 4)
    parts.bring("text", 3)
    exchange = Exchange(parts, Mesh())
    whole = torch.tensor([1, 0, 1, 1, 1, 1, 0], dtype=kept).reshape(1, 1, 1, 7)
    exchange.masks["image text"] = whole
    attention = exchange.module((Attend("image text"),))
    keys, key = [parts["image"], parts["text"]], torch.zeros(2, 1, 4, 8)
    made = attention._whole_mask("image text", keys, key, torch.zeros(1, 1, 1, 4, dtype=torch.bfloat16))
    assert torch.equal(made, whole)
    assert made.dtype == (torch.bool if kept is torch.bool else torch.bfloat16)


def test_a_name_that_the_model_lacks_is_an_error():
    region = Region({"layers": Blocks({"x": Tokens("image")}, ("image",))})
    with pytest.raises(PlanMismatch, match="has no layers"):
        SpreadTokens(Model(), Plan((region,)), Mesh())


def test_blocks_may_be_modules_of_blocks():
    class Outer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Block()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)

    model = Model()
    model.blocks[0] = Outer()
    blocks = Blocks({"x": Tokens("image")}, ("image",))
    spread = SpreadTokens(
        model, Plan((Region({"blocks.*.inner": blocks}, gather="image", each=True),)), Mesh()
    )
    model(torch.zeros(1, 5, 2))
    assert spread.parts["image"].length == 5
    with pytest.raises(PlanMismatch, match=r"has no blocks\.\*\.other"):
        SpreadTokens(model, Plan((Region({"blocks.*.other": blocks}),)), Mesh())


def test_a_sum_over_tokens_needs_some_on_every_rank():
    parts = Parts(2, 0)
    parts.bring("image", 1)
    with pytest.raises(PlanMismatch, match="cannot be split over 2 ranks"):
        parts.bring("image", 1, every=True)


class Attending(torch.nn.Module):
    """A block whose tokens see those up to `reach` away; or each those before it, as the prefix does."""

    def __init__(self, reach: int | None, prefix: int = 0):
        super().__init__()
        self.reach, self.prefix = reach, prefix

    def forward(self, x: torch.Tensor, kept: tuple[torch.Tensor, ...] = ()) -> torch.Tensor:
        attend, mask = torch.nn.functional.scaled_dot_product_attention, None
        x = x[:, None]
        if self.reach is not None:
            places = torch.arange(x.shape[2])
            mask = (places[:, None] - places).abs() <= self.reach
        first, rest = x.split([self.prefix, x.shape[2] - self.prefix], 2)
        out = attend(rest, x, x, attn_mask=mask)
        if self.prefix:
            out = torch.cat([attend(first, first, first, is_causal=True), out], 2)
        return out[:, 0]


class AttendingModel(Model):
    def __init__(self, block: torch.nn.Module):
        super().__init__()
        self.blocks[0] = block

    def forward(self, x: torch.Tensor, **lengths: int) -> torch.Tensor:
        return self.blocks[0](x)


@pytest.mark.parametrize("reach", [None, 1])
def test_a_window_is_what_its_module_says(reach: int | None):
    model, x = AttendingModel(Attending(reach)), torch.randn(1, 6, 4)
    wanted = model(x)
    region = Region(
        {"blocks": Blocks({"x": Tokens("image")}, ("image",))},
        {"blocks.*": Attend("image", window="reach")},
        same=frozenset({"kept"}),
    )
    SpreadTokens(model, Plan((region,)), Mesh())
    torch.testing.assert_close(model(x), wanted)


def test_a_prefix_is_whole_and_causal():
    model, x = AttendingModel(Attending(None, prefix=2)), torch.randn(1, 6, 4)
    wanted = model(x)
    region = Region(
        {"blocks": Blocks({"x": Tokens("* image")}, ("* image",))},
        {"blocks.*": Attend("image", "* image", causal=True)},
        same=frozenset({"kept"}),
        gather="image",
        prefix=Prefix("long", "kept"),
    )
    spread = SpreadTokens(model, Plan((region,)), Mesh())
    torch.testing.assert_close(model(x, long=2), wanted)
    assert spread.parts["image"].length == 4


class Sparse:
    """As much of ComfyUI's sparse tensor as a plan knows of it."""

    def __init__(self, feats: torch.Tensor, coords: torch.Tensor, shape: torch.Size):
        self.feats, self.coords, self.shape = feats, coords, shape

    @property
    def layout(self) -> list[slice]:
        ends = torch.bincount(self.coords[:, 0], minlength=self.shape[0]).cumsum(0).tolist()
        return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]

    def replace(self, feats: torch.Tensor) -> Sparse:
        return Sparse(feats, self.coords, self.shape)


def sparse(*counts: int) -> Sparse:
    """Voxels of several items, so many of each."""
    items = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    coords = torch.cat([items[:, None], torch.arange(3 * sum(counts)).view(-1, 3)], 1)
    return Sparse(torch.randn(sum(counts), 4), coords, torch.Size([len(counts), 4]))


def test_voxels_of_each_of_the_batch_are_split():
    whole, picture = sparse(5, 5), torch.randn(10, 2)
    for rank, size in ((0, 3), (1, 2)):
        parts = Parts(2, rank)
        parts.bring("image", 5)
        own = torch.arange(10).view(2, 5)[:, slice(0, 3) if rank == 0 else slice(3, 5)].flatten()
        part = parts.take(Voxels("image"), whole)
        assert torch.equal(part.feats, whole.feats[own]) and torch.equal(part.coords, whole.coords[own])
        assert [rows.stop - rows.start for rows in part.layout] == [size, size]
        named = parts.take(Named({"proj": Voxels("image")}), {"proj": picture, "global": picture})
        assert torch.equal(named["proj"], picture[own]) and named["global"] is picture


def test_a_model_of_voxels_gets_them_back():
    class Scaled(Block):
        def forward(self, x):
            return x.replace(2 * x.feats)

    model = Model()
    model.blocks[0] = Scaled()
    blocks = {"blocks": Blocks({"x": Voxels("image")}, (Voxels("image"),))}
    absent = Region({"others": Blocks()}, optional=True)
    SpreadTokens(model, Plan((absent, Region(blocks, gather="image"))), Mesh())
    whole = sparse(4, 4)
    assert torch.equal(model(whole).feats, 2 * whole.feats)
    with pytest.raises(PlanMismatch, match="shapes of 3 to 4 voxels in one batch"):
        model(sparse(3, 4))


class Skipping(Block):
    """A block that is told whether to attend."""

    def forward(self, x, transformer_options):
        skipped = transformer_options["skip"]
        return x if skipped else torch.nn.functional.scaled_dot_product_attention(x, x, x)


def test_an_attention_that_a_call_leaves_out():
    attention = {"blocks.*": Attend("image", unless="skip")}
    blocks = {"blocks": Blocks({"x": Tokens("image", 2)}, (Tokens("image", 2),))}
    model = Model()
    model.blocks[0] = Skipping()
    region = Region(blocks, attention, same=frozenset({"transformer_options"}))
    SpreadTokens(model, Plan((region,)), Mesh())
    x = torch.randn(1, 1, 4, 2)
    assert torch.equal(model.blocks[0](x, transformer_options={"skip": True}), x)
    assert not torch.equal(model.blocks[0](x, transformer_options={"skip": False}), x)


class ByMethods(torch.nn.Module):
    """A model that calls methods of its block."""

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList([TwoStreams()])

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        (block,) = self.blocks
        y = block.forward_text(y)
        return block.forward_image(x, y, scale=2.0), y


class TwoStreams(torch.nn.Module):
    def forward_text(self, y: torch.Tensor) -> torch.Tensor:
        return y + 1

    def forward_image(self, x: torch.Tensor, y: torch.Tensor, scale: float) -> torch.Tensor:
        return x * scale + y.sum()


def test_methods_in_place_of_blocks():
    regions = (
        Region({"blocks:forward_text": Blocks({"y": Tokens("text")}, (None,))}),
        Region(
            {"blocks:forward_image": Blocks({"x": Tokens("image")}, ("image",), {"y": "text"})},
            same=frozenset({"scale"}),
            gather="image",
            whole={"blocks.*:forward_image": {"x": "image", "y": "text"}},
        ),
    )
    model, x, y = ByMethods(), torch.randn(1, 5, 2), torch.randn(1, 3, 2)
    wanted = model(x, y)
    spread = SpreadTokens(model, Plan(regions), Mesh())
    assert all(torch.equal(a, b) for a, b in zip(model(x, y), wanted, strict=True))
    assert (spread.parts["image"].length, spread.parts["text"].length) == (5, 3)
    spread.close()
    assert not {"forward_text", "forward_image"} & set(vars(model.blocks[0]))
    wrong = Region({"blocks:forward_text": Blocks({"x": Tokens("text")}, (None,))})
    with pytest.raises(PlanMismatch, match="takes y, which its plan does not know"):
        SpreadTokens(model, Plan((wrong,)), Mesh())


@pytest.mark.parametrize("blocks", [2, 3, 4])
def test_a_query_that_sees_nothing_of_its_first_blocks_sees_the_others(blocks: int):
    """Causal attention in a ring: what comes first may weigh nothing."""
    generator = torch.Generator().manual_seed(blocks)
    query, key, value = (torch.randn(1, 2, 61, 32, generator=generator) for _ in range(3))
    mask = torch.ones(61, 61, dtype=torch.bool).tril()
    wanted = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask)
    spans = torch.arange(61).chunk(blocks)
    for own in spans:
        for order in (spans, spans[::-1]):
            result = Blockwise(query[:, :, own], None)
            for span in order:
                result.add(key[:, :, span], value[:, :, span], mask[own][:, span][None, None])
            part = wanted[:, :, own]
            assert float((result.result - part).norm() / part.norm()) <= 1e-6
