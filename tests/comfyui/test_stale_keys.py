"""PipeFusion of ComfyUI's classes after one warm-up step: equal to a simulation of stale keys."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.comfyui.inputs import relative_l2
from tests.comfyui.stale_classes import StaleClass
from tests.comfyui.test_pipefusion_classes import CFG, SIGMAS, plain, remote, request, sides
from tests.comfyui.tiny_classes import module_of, write
from tests.stale_keys import euler, token_of_element
from worker.models.comfyui.cases import CASES

EXACT, DRIFTS = 1e-5, 1e-4
# What a latent of each is, to tokens; and by tokens and stages where patches end.
KINDS = {"flux": "image", "wan t2v": "video", "qwen image": "video"}
ENDS = {(35, 2): [18, 35], (105, 2): [53, 105], (35, 4): [9, 18, 27, 35]}
RUNS = [("flux", 2), ("flux", 4), ("wan t2v", 2), ("qwen image", 2)]


@pytest.fixture(scope="module")
def host(comfyui) -> Any:
    from comfy_xdit.comfy_types.installation import host_comfyui

    return replace(host_comfyui(), switches=())


def simulated(name: str, module: torch.nn.Module, stages: int) -> torch.Tensor:
    """The run in one process, of whole calls."""
    x, conditions = sides(name, module)
    tokens = token_of_element(KINDS[name], x.shape)
    count = int(tokens.max()) + 1
    stale, ends = StaleClass(module, count), ENDS[count, stages]

    def call(x: torch.Tensor, sigma: torch.Tensor, group: int) -> torch.Tensor:
        return module(x, sigma[None] * 1000, **conditions[group], transformer_options={})

    def combined(outputs: list[torch.Tensor]) -> torch.Tensor:
        negative, positive = outputs
        return negative + (positive - negative) * CFG

    with torch.inference_mode():
        return euler(call, stale, len(conditions), x, tokens, SIGMAS, ends, 1, combined)


@pytest.mark.parametrize(("name", "stages"), RUNS, ids=str)
def test_patches_drift_as_stale_keys_say(comfyui, host, name, stages):
    folder = comfyui.models / "diffusion_models"
    module, _ = module_of(CASES[name])
    model = remote(host, folder / write(name, folder), {"pipefusion_degree": stages}, warmup=1)

    got = model.sample(request(model, name, module))

    whole = plain(name, module)
    assert relative_l2(got, simulated(name, module, stages)) <= EXACT
    assert relative_l2(got, whole) >= DRIFTS, "or nothing would be stale here"
