"""Sentences that no other test shows: what is refused, and that nothing is lost by it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from comfy_xdit.headless.folders import Folders
from comfy_xdit.headless.format import api_of
from comfy_xdit.headless.pictures import save
from comfy_xdit.headless.surroundings import HEADLESS
from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.parallel import ParallelConfig, parse_devices
from comfy_xdit.protocol.spec import ModelSpec
from comfy_xdit.remote.model import RemoteModel
from tests import tiny
from worker.checkpoints import read_json
from worker.text.encoders import TextEncoders

CPU = ("cpu",) * 4


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        (
            ParallelConfig(ulysses_degree=0),
            "ulysses_degree is 0; a degree is at least 1. Set it to 1 or more",
        ),
        (
            ParallelConfig(cfg_parallel_degree=3),
            "cfg_parallel_degree is 3; guidance has two branches.*1 or 2",
        ),
        (ParallelConfig(ring_degree=5), "ring_degree 5 = 5, but 4 devices.*set the degrees.*or choose other"),
    ],
)
def test_layouts(layout: ParallelConfig, words: str):
    with pytest.raises(InvalidInput, match=words):
        layout.check(CPU)


def test_a_device_named_twice():
    with pytest.raises(
        InvalidInput, match="device cuda:0 is named twice, and each rank needs its own; name it once"
    ):
        parse_devices("0, cuda:0", ("cuda:0", "cuda:1"))


def test_specs(tmp_path: Path):
    with pytest.raises(InvalidInput, match=r"weight_dtype 'int3' is not one of .*choose one"):
        ModelSpec.of(tmp_path, "transformer", "int3")
    with pytest.raises(InvalidInput, match=r"no file or folder at .*gone; choose a model that exists"):
        ModelSpec.of(tmp_path / "gone", "transformer")


def test_files_and_wires_without_comfyui(tmp_path: Path):
    with pytest.raises(InvalidInput, match=r"no diffusion model 'gone'; give the path .*XDIT_MODELS_DIR"):
        HEADLESS.path("diffusion_models", "gone")
    with pytest.raises(InvalidInput, match=r"no pipeline 'gone'; give the path .*XDIT_MODELS_DIR"):
        HEADLESS.path("diffusers", "gone")
    with pytest.raises(InvalidInput, match="str is neither a MODEL, a CLIP nor a VAE; connect"):
        HEADLESS.remote_of("model")
    folders = Folders(tmp_path)
    with pytest.raises(InvalidInput, match=r"images has the shape \(2, 2\).*connect an IMAGE"):
        save(torch.zeros(2, 2), "a", folders, {}, {})


@pytest.mark.parametrize(
    ("graph", "words"),
    [
        ({"nodes": [{"id": 1}]}, "has no id or no type; save it anew"),
        ({"nodes": [], "links": [[1, 2]]}, r"link \[1, 2\] of the workflow is damaged; save it anew"),
        (
            {"nodes": [{"id": 1, "type": "A", "inputs": [{"name": "x", "link": 9}]}]},
            "link 9 at input x leads nowhere; save the workflow anew",
        ),
    ],
)
def test_damaged_workflows(graph: dict[str, Any], words: str):
    class A:
        @classmethod
        def INPUT_TYPES(cls) -> dict[str, Any]:
            return {"required": {"x": ("IMAGE",)}}

    with pytest.raises(InvalidInput, match=words):
        api_of(graph, {"A": A})


def test_folders_of_another_pipeline_and_damaged_words(tmp_path: Path):
    with pytest.raises(
        InvalidInput, match=r"model_index\.json is missing; choose a complete diffusers folder"
    ):
        read_json(tmp_path / "model_index.json")
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(InvalidInput, match=r"model_index\.json is damaged: .*download it again"):
        read_json(tmp_path / "model_index.json")
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "KandinskyPipeline"}))
    with pytest.raises(InvalidInput, match=r"is a KandinskyPipeline; this version reads Stable"):
        TextEncoders(ModelSpec.of(tmp_path, "text_encoders"), torch.device("cpu"))


# ---------------------------------------------------------------------- calls of a loaded model


def _without_context(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name != "context"}


CALLS: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor], Callable[[dict], dict], str]] = {
    "channels": ("sd3", lambda x: x[:, :4], dict, r"shape \(1, 4, 8, 8\), sd3 takes \(batch, 16.*empty lat"),
    "not finite": ("sd3", lambda x: x / 0, dict, "not finite .*check the node that made it"),
    "no prompt": ("sd3", lambda x: x, _without_context, "has no context; encode the prompt with the text"),
    "another model's prompt": (
        "flux",
        lambda x: x,
        lambda given: given | {"context": given["context"][..., :8]},
        "context is 8 wide, flux takes 64; encode the prompt .*another model's CLIP does not fit",
    ),
    "unknown condition": (
        "flux",
        lambda x: x,
        lambda given: given | {"clip_fea": torch.ones(1)},
        r"carries clip_fea, which flux .* does not take \(it takes .*remove the node",
    ),
    "unknown method of references": (
        "flux",
        lambda x: x,
        lambda given: given | {"ref_latents": [torch.zeros(1, 16, 8, 8)], "ref_latents_method": "negative"},
        "by the method 'negative' are not in this version; use one of offset, index, uxo",
    ),
    "reference of another model": (
        "flux",
        lambda x: x,
        lambda given: given | {"ref_latents": [torch.zeros(1, 4, 8, 8)]},
        r"reference latent has shape \(1, 4, 8, 8\).*encode the reference with the VAE of this model",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CALLS)
def test_a_call_that_cannot_be_costs_nothing(tiny_models: dict[str, Any], case: str):
    name, change, conditions, words = CALLS[case]
    model = tiny_models[name]
    remote = RemoteModel(ModelSpec.of(model.file, "transformer"), ParallelConfig())
    x, timestep = torch.ones(1, 16, 8, 8), torch.full((1,), 0.7)
    given = tiny.conditions(model.family, model.config, 9)
    before = remote.denoise(x, timestep, given)

    with pytest.raises(InvalidInput, match=words):
        remote.denoise(change(x), timestep, conditions(given))
    assert torch.equal(remote.denoise(x, timestep, given), before)


@pytest.mark.parametrize(
    ("parallel", "batch"),
    [
        (ParallelConfig(ring_degree=2), 1),
        # Three branches, two pictures: the branch without one must not be waited for.
        (ParallelConfig(ring_degree=2, data_parallel_degree=3), 2),
    ],
)
def test_a_picture_smaller_than_its_ring(tiny_models: dict[str, Any], parallel: ParallelConfig, batch: int):
    """One image token on two ranks: one of them has none, and the picture is right all the same."""
    model = tiny_models["flux"]
    remote = RemoteModel(ModelSpec.of(model.file, "transformer"), parallel)
    given = tiny.conditions(model.family, model.config, 9, batch)
    x, timestep = torch.ones(batch, 16, 2, 2), torch.full((batch,), 0.7)
    expected = tiny.reference(model.family, model.module, x, timestep, given)
    assert tiny.relative_l2(remote.denoise(x, timestep, given), expected) <= 1e-5
