"""Every sampler of this ComfyUI with every scheduler: the latent of the stock MODEL.

What is measured goes to output/samplers.json, of which `python -m benchmarks.samplers` makes the table
in docs/comfyui.md.
"""

import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from comfy_xdit.ranks.environment import ROOT
from tests.comfyui.inputs import FAMILIES, empty_latent, pair, random_conditioning, relative_l2

# The target is 1e-4. Measured is at most 8e-6, the rounding of another order of sums, also for SDE
# samplers, whose noise is the same; a wider bound would let a wrong timestep pass.
PER_RUN = 3e-5
STEPS = 3
SCALES = (1.0, 3.0)  # without and with a negative prompt
OUTPUT = ROOT / "output" / "samplers.json"

Cell = tuple[str, str, float]  # sampler, scheduler, cfg


@pytest.fixture(scope="module")
def stock_latents() -> dict[str, dict[Cell, torch.Tensor]]:
    """What the stock MODEL of a family draws, computed once for all layouts."""
    return {family: {} for family in FAMILIES}


@pytest.fixture(scope="module")
def measured(comfyui) -> Iterator[dict[str, Any]]:
    """The worst difference of each cell, by family and layout; written at the end."""
    import comfyui_version

    rows: dict[str, Any] = {}
    yield rows
    OUTPUT.parent.mkdir(exist_ok=True)
    known = json.loads(OUTPUT.read_text()) if OUTPUT.exists() else {}
    known[comfyui_version.__version__] = rows
    OUTPUT.write_text(json.dumps(known, indent=1))


def cells() -> list[Cell]:
    """Everything the widgets of KSampler offer."""
    from comfy.samplers import KSampler

    return [(a, b, cfg) for a in KSampler.SAMPLERS for b in KSampler.SCHEDULERS for cfg in SCALES]


@pytest.mark.timeout(3000)  # more than four thousand runs in all
@pytest.mark.parametrize("family", FAMILIES)
def test_every_sampler_with_every_scheduler(
    request, run_node, degrees, family, stock_latents, measured, layout_name
):
    models = pair(run_node, request.getfixturevalue(f"tiny_{family}"), degrees)
    positive, negative = (random_conditioning(models.ours, seed) for seed in (1, 2))
    differences = {}

    def draw(model: Any, sampler: str, scheduler: str, cfg: float) -> torch.Tensor:
        (latent,) = run_node(
            "KSampler", model=model, seed=7, steps=STEPS, cfg=cfg, sampler_name=sampler, scheduler=scheduler,
            denoise=1.0, positive=positive, negative=negative, latent_image=empty_latent(1, 6, 9),
        )  # fmt: skip
        return latent["samples"]

    for cell in cells():
        if cell not in stock_latents[family]:
            stock_latents[family][cell] = draw(models.stock, *cell)
        differences[cell] = relative_l2(draw(models.ours, *cell), stock_latents[family][cell])
    measured[f"{family} {layout_name}"] = [[*cell, value] for cell, value in differences.items()]

    # The comparison says something: each drew a latent, and one that depends on the model.
    drawn = stock_latents[family]
    assert all(latent.isfinite().all() for latent in drawn.values())
    moved = {
        names: relative_l2(drawn[(*names, SCALES[1])], drawn[(*names, SCALES[0])])
        for names in {cell[:2] for cell in drawn}
    }
    assert min(moved.values()) > 10 * PER_RUN, moved
    wrong = {cell: d for cell, d in differences.items() if not (math.isfinite(d) and d <= PER_RUN)}
    assert not wrong, wrong
