"""Has this ComfyUI changed anything that comfy_types relies on? Each failure is a sentence."""

from collections.abc import Callable

import pytest

from tests.comfyui import contract
from tests.comfyui.inputs import layout


@pytest.mark.parametrize("check", contract.CHECKS, ids=lambda check: check.__name__)
def test_comfyui_is_as_known(comfyui, check: Callable[[], list[str]]):
    assert not check()


def test_twin_has_every_name_and_shape_and_no_weight(comfyui, run_node, tiny_sd3):
    (stock,) = run_node("UNETLoader", unet_name=tiny_sd3, weight_dtype="default")
    (model,) = run_node(
        "XDiTLoadDiffusionModel", unet_name=tiny_sd3, weight_dtype="default", parallel=layout(1)
    )

    assert not contract.twin(model, stock)
    assert model.model_size() < 1024
    assert model.model.memory_required([2, 16, 128, 128]) == 0
