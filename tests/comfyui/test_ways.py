"""Every way to change a MODEL from outside: our MODEL draws what the changed stock one does, or refuses."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from comfy_xdit.protocol.errors import InvalidInput
from tests.comfyui.inputs import empty_latent, layout, random_conditioning, relative_l2
from tests.comfyui.ways import WAYS, Scene
from tests.comfyui.ways_table import REFUSED, RIGHT, WaysTable, named

CLOSE = 1e-5  # relative L2 of a run of two steps
OTHER = 1e-3  # and at least that far is another picture
# The tiny FLUX.1 has widths that ComfyUI knows of none; ranks that build its class themselves refuse it.
KINDS = ("FLUX.1", "SD3", "SD3 in ComfyUI's class")


@pytest.fixture(scope="module")
def table(comfyui) -> Iterator[WaysTable]:
    """Written as a page where the environment names one and every test here has run."""
    table = WaysTable(importlib.import_module("comfyui_version").__version__)
    yield table
    page = os.environ.get("XDIT_CHANGES_PAGE")
    if page and table.is_whole([*WAYS], [*KINDS]):
        table.write(Path(page), {way for way, what in WAYS.items() if what.draws != "other"})


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def family(kind) -> str:
    return "flux" if kind.startswith("FLUX") else "sd3"


@pytest.fixture
def load(request, run_node, kind, family, monkeypatch) -> Any:
    """load("ours"), load("stock"): a MODEL that no other test has."""
    from comfy_xdit.comfy_types.choice import FORCED

    if "ComfyUI" in kind:
        monkeypatch.setenv(FORCED, "comfyui")
    inputs = {"unet_name": request.getfixturevalue(f"tiny_{family}"), "weight_dtype": "default"}

    def scene(whose: str) -> Scene:
        if whose == "stock":
            (model,) = run_node("UNETLoader", **inputs)
        else:
            (model,) = run_node("XDiTLoadDiffusionModel", **inputs, parallel=layout(1))
        return Scene(model, family, run_node, (random_conditioning(model, 1), random_conditioning(model, 2)))

    return scene


def sample(scene: Scene, model: Any = None) -> torch.Tensor:
    """What KSampler makes of nothing with a scene's MODEL, or what became of it; prompts are of the first."""
    (latent,) = scene.run_node(
        "KSampler", model=scene.model if model is None else model, seed=1, steps=2, cfg=2.0,
        sampler_name="euler", scheduler="simple", denoise=1.0, latent_image=empty_latent(1, 8, 8),
        positive=scene.prompts[0], negative=scene.prompts[1],
    )  # fmt: skip
    return latent["samples"]


@pytest.mark.parametrize("name", WAYS)
def test_right_or_refused_by_name_and_nothing_is_lost(load, table, kind, name):
    way, ours, stock = WAYS[name], load("ours"), load("stock")
    before = sample(ours)
    assert relative_l2(before, sample(stock)) <= CLOSE
    wanted = before
    if way.draws != "none":
        with way.change(stock) as changed:
            wanted = sample(stock, changed)
        is_other = relative_l2(wanted, before) >= OTHER
        assert way.draws == "any" or is_other == (way.draws == "other")

    try:
        with way.change(ours) as changed:
            drawn = sample(ours, changed)
    except InvalidInput as error:
        came, words = REFUSED, named(str(error))
    else:
        assert relative_l2(drawn, wanted) <= CLOSE, "another picture, in silence"
        came, words = RIGHT, ""

    table.record(name, kind, came, words)
    assert came == (REFUSED if way.refused else RIGHT)
    if way.refused:
        assert words
    assert torch.equal(sample(load("ours")), before)


def test_a_function_that_a_pack_brought_before_there_was_a_model_is_refused(load, tmp_path, monkeypatch):
    import folder_paths

    pack = tmp_path / "custom_nodes" / "some_pack" / "nodes.py"
    pack.parent.mkdir(parents=True)
    pack.write_text("def patched(before):\n    return lambda *args, **more: before(*args, **more)\n")
    folder_paths.add_model_folder_path("custom_nodes", str(tmp_path / "custom_nodes"))
    scope: dict[str, Any] = {"__name__": "some_pack.nodes"}
    exec(compile(pack.read_text(), str(pack), "exec"), scope)
    of_class = type(load("stock").transformer)
    from comfy_xdit.comfy_types.model import original_code

    monkeypatch.setattr(original_code, "_first", {})  # as if no twin had been made before
    monkeypatch.setattr(of_class, "forward", scope["patched"](of_class.forward))
    late = load("ours")

    with pytest.raises(InvalidInput, match=r"\.forward \(of .*some_pack/nodes\.py\).*restart ComfyUI"):
        sample(late)


def test_a_class_that_was_changed_after_the_first_model_is_refused_for_later_ones(
    run_node, load, monkeypatch
):
    first = load("ours")
    of_block = type(first.block)
    before = of_block.forward
    monkeypatch.setattr(of_block, "forward", lambda self, *args, **more: before(self, *args, **more))

    with pytest.raises(InvalidInput, match=rf"{of_block.__name__}\.forward.*restart ComfyUI"):
        sample(load("ours"))
    monkeypatch.undo()
    sample(first)
    sample(load("ours"))


def test_what_classes_are_given_more_and_never_call_may_stay(load, monkeypatch):
    scene = load("ours")
    before = sample(scene)
    monkeypatch.setattr(type(scene.block), "notes_of_a_pack", {}, raising=False)
    monkeypatch.setattr(type(scene.block), "helper_of_a_pack", lambda self: None, raising=False)

    for _ in range(2):
        assert torch.equal(sample(scene), before)

    monkeypatch.setattr(type(scene.block), "__call__", lambda self: None, raising=False)
    with pytest.raises(InvalidInput, match=r"\.__call__"):
        sample(scene)
