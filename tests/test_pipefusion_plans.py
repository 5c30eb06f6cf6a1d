"""PipeFusion from plans: diffusers' classes over stages against themselves whole, and against stale keys."""

from __future__ import annotations

import pytest
import torch

from comfy_xdit.protocol.errors import InvalidInput
from tests.pipefusion_plan_ranks import NAMES, RUNS, STAGED, WORLD
from tests.rank_programs import found_by_ranks
from worker.models.plans.diffusers import PLANS
from worker.parallel.attention.kept_keys import KeptOrder, Patches
from worker.parallel.mesh import Mesh
from worker.parallel.pipefusion.cuts import Cuts, region_of_patches
from worker.parallel.pipefusion.stage import Stage
from worker.parallel.plan import Attend, Blocks, Plan, PlanMismatch, Region, Tokens

WHOLE, STALE = 1e-6, 1e-5
DRIFT = 1e-3  # what stale keys make of random models, at least
LAYOUTS = ("2 stages", "4 stages", "2 stages x Ulysses 2", "2 stages x Ring 2")
SECONDS = 900


@pytest.fixture(scope="module")
def measured() -> dict[str, dict[str, list[float]]]:
    """By case and layout, by run, relative L2 from what it should be and from whole calls: four processes."""
    return found_by_ranks("tests.pipefusion_plan_ranks", WORLD, SECONDS)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", NAMES)
def test_stages_compute_what_one_process_does(measured, case: str, layout: str):
    found = measured[f"{case}, {layout}"]
    assert found.keys() == RUNS.keys()
    for title, (error, drift) in found.items():
        if title == "warm-up":
            assert error <= WHOLE
        else:
            assert error <= STALE, title
            assert drift >= DRIFT, "stale keys would not be missed"


REFUSED = {
    "DiTTransformer2DModel": "names no stream",
    "LTX2VideoTransformer3DModel": "names no stream",
    "LatteTransformer3DModel": "in 2 regions",
    "MochiTransformer3DModel": "linear, or drops tokens",
    "SanaTransformer2DModel": "convolve over neighbouring tokens",
    "ZImageTransformer2DModel": "in 2 regions",
}


@pytest.mark.parametrize("name", PLANS)
def test_what_patches_cannot_do_is_refused_by_name(name: str):
    if name not in REFUSED:
        assert region_of_patches(PLANS[name], name).blocks is PLANS[name].regions[0].blocks
        return
    with pytest.raises(PlanMismatch, match=f"{name}.*{REFUSED[name]}.*set pipefusion_degree to 1, and use"):
        region_of_patches(PLANS[name], name)


def test_more_stages_than_blocks_are_refused():
    case = STAGED["PixArt"]
    with pytest.raises(InvalidInput, match=r"5 is more than the 4 blocks of this pixart.*to 4 or less"):
        Stage(case.build(), PLANS[case.family], "pixart", 0, 5, Mesh())


def test_a_stage_holds_its_blocks_and_no_others():
    case, stages = STAGED["FLUX.1"], 3
    whole, held = case.build().state_dict(), []
    for index in range(stages):
        model = case.build()
        stage = Stage(model, PLANS[case.family], "flux", index, stages, Mesh())
        blocks = {name for name in model.state_dict() if "transformer_blocks." in name}
        assert {".".join(name.split(".")[:2]) for name in blocks} == set(stage.names)
        held += sorted(blocks)
        assert model.state_dict().keys() <= whole.keys()
    assert sorted(held) == sorted(name for name in whole if "transformer_blocks." in name)


def test_outputs_that_later_blocks_read_travel_through_the_stages_between():
    case = STAGED["HunyuanDiT"]  # block 4 reads block 1, block 5 reads block 0
    cuts = Cuts.of(case.build(), PLANS[case.family], 3)
    assert [list(run) for run in cuts.runs] == [[0, 1], [2, 3], [4, 5]]
    assert [cuts.across(stage) for stage in range(3)] == [[], [0, 1], [0, 1, 3]]


@pytest.mark.parametrize(("ulysses", "ring"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_every_key_has_one_place(ulysses: int, ring: int):
    patches = Patches("image", ((0, 1), (1, 8), (8, 11)))
    order = KeptOrder({"text": 5, "image": 11}, patches, Mesh(ulysses, ring), torch.device("cpu"))
    true = torch.cat([order.true(block) for block in range(ring)])
    assert torch.equal(true.sort().values, torch.arange(16))
    assert torch.equal(order.kept(true), torch.arange(16))
    spans = [span for of_block in order.places for span in of_block]
    assert [a[1] for a in spans[:-1]] == [b[0] for b in spans[1:]]


class Block(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


class Mixing(torch.nn.Module):
    """A model whose head may see neighbours."""

    def __init__(self, reach: int):
        super().__init__()
        self.blocks = torch.nn.ModuleList([Block(), Block()])
        self.reach = reach

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x + self.reach * x.roll(1, 1) if self.reach else x


def test_a_head_that_mixes_tokens_is_refused():
    plan = Plan((Region({"blocks": Blocks({"x": Tokens("image")}, ("image",))}, gather="image"),), "image")
    patches = Patches("image", ((0, 3), (3, 6)))
    x = torch.zeros(1, 6, 2)
    for reach in (0, 1):
        model = Mixing(reach)
        stage = Stage(model, plan, "mixing", 0, 1, Mesh())
        stage.whole(lambda model=model: model(x), 0)
        if reach == 0:
            assert stage.owners(lambda model=model: model(x), patches).tolist() == [0] * 6 + [1] * 6
            assert torch.equal(model(x), x + 2), "the blocks are back"
            continue
        with pytest.raises(PlanMismatch, match="the head of Mixing mixes tokens"):
            stage.owners(lambda model=model: model(x), patches)


def test_patches_are_as_even_as_they_go():
    assert Patches.of("image", 3, 3).spans == ((0, 1), (1, 2), (2, 3))
    assert Patches.of("image", 7, 3).spans == ((0, 3), (3, 5), (5, 7))


def test_blocks_that_make_tokens_of_their_own_are_refused():
    region = Region({"blocks": Blocks({"x": Tokens("image")}, ("image",))}, {"blocks.*": Attend("image *")})
    with pytest.raises(PlanMismatch, match="make tokens of their own"):
        region_of_patches(Plan((region,), "image"), "Model")
