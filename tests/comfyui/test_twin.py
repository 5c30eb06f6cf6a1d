"""Twins of full-size models from file headers alone: no weight is needed to know a model."""

import json
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from comfy_xdit.nodes.surroundings import SamplerInputs
from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.spec import ModelSpec
from comfy_xdit.remote.model import RemoteModel
from tests.comfyui.inputs import empty_latent, layout
from tests.described import DESCRIBED

FLUX = {
    "image_model": "flux",
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "vec_in_dim": 768,
    "context_in_dim": 4096,
    "hidden_size": 3072,
    "mlp_ratio": 4.0,
    "num_heads": 24,
    "depth": 19,
    "depth_single_blocks": 38,
    "axes_dim": [16, 56, 56],
    "theta": 10000,
    "qkv_bias": True,
    "guidance_embed": True,
}


def _write_header(file: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """A safetensors file whose weights are a hole: it takes no space."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": "BF16",
            "shape": list(tensor.shape),
            "data_offsets": [end, end + 2 * tensor.numel()],
        }
        end += 2 * tensor.numel()
    text = json.dumps(header).encode()
    with file.open("wb") as opened:
        opened.write(struct.pack("<Q", len(text)) + text)
        opened.truncate(8 + len(text) + end)
    return file


def _remote(path: Path) -> RemoteModel:
    return RemoteModel(
        ModelSpec.of(path, "transformer"), layout(1), replace(DESCRIBED, dtype="bfloat16").plain()
    )


@pytest.fixture(scope="module")
def flux_file(comfyui, tmp_path_factory) -> Path:
    """FLUX.1 dev as its release spells it."""
    import comfy.ldm.flux.model
    import comfy.ops

    config = {key: value for key, value in FLUX.items() if key != "image_model"}
    if "txt_ids_dims" in comfy.ldm.flux.model.FluxParams.__annotations__:
        config["txt_ids_dims"] = []
    flux = comfy.ldm.flux.model.Flux(
        **config, device=torch.device("meta"), dtype=torch.bfloat16, operations=comfy.ops.disable_weight_init
    )
    return _write_header(tmp_path_factory.mktemp("flux") / "flux1-dev.safetensors", flux.state_dict())


def test_flux_twin(flux_file):
    from comfy_xdit.comfy_types.contract import twin
    from comfy_xdit.comfy_types.model.handles import model_of

    model = model_of(_remote(flux_file))

    assert type(model.model).__name__ == "Flux"
    assert model.model_dtype() == torch.bfloat16
    assert model.model_size() == 1
    assert not twin(model, model)
    assert sum(p.numel() for p in model.model.diffusion_model.parameters()) > 11e9


def test_twin_keeps_its_layers_where_comfyui_makes_them_lazily(flux_file, monkeypatch):
    """As ComfyUI with dynamic VRAM does: a stock Linear has no weight until it is loaded."""
    import comfy.ops

    from comfy_xdit.comfy_types.model.handles import model_of

    stock = comfy.ops.disable_weight_init.Linear
    eager, loading = stock.__init__, stock._load_from_state_dict

    def lazy(self, *args, **kwargs):
        eager(self, *args, **kwargs)
        if type(self)._load_from_state_dict is loading:
            self.weight = self.bias = None

    monkeypatch.setattr(stock, "__init__", lazy)
    assert stock(2, 2).weight is None
    model = model_of(_remote(flux_file))

    assert sum(p.numel() for p in model.model.diffusion_model.parameters()) > 11e9


def test_diffusers_folder_in_shards_has_the_same_twin(flux_file, tmp_path):
    from accelerate import init_empty_weights
    from diffusers import FluxTransformer2DModel

    from comfy_xdit.comfy_types.contract import twin
    from comfy_xdit.comfy_types.model.handles import model_of

    with init_empty_weights():
        tensors = FluxTransformer2DModel(guidance_embeds=True).state_dict()
    names = sorted(tensors)
    (tmp_path / "transformer").mkdir()
    (tmp_path / "model_index.json").write_text("{}")
    for number, part in enumerate((names[::2], names[1::2]), 1):
        _write_header(
            tmp_path / "transformer" / f"diffusion_pytorch_model-0000{number}-of-00002.safetensors",
            {name: tensors[name] for name in part},
        )

    assert not twin(model_of(_remote(tmp_path)), model_of(_remote(flux_file)))


def test_flux_request_carries_guidance_and_sigma_as_timestep(flux_file):
    from comfy_xdit.comfy_types.model.handles import model_of
    from comfy_xdit.comfy_types.sampling import sample_request

    model = model_of(_remote(flux_file))
    conditioning = [[torch.zeros(1, 256, 4096), {"pooled_output": torch.zeros(1, 768), "guidance": 2.0}]]

    inputs = SamplerInputs(1, 4, 1.0, "euler", "simple", conditioning, conditioning, empty_latent(2, 8, 8))
    request, finish = sample_request(model, inputs)

    assert {name: tuple(value.shape) for name, value in request.positive.items()} == {
        "context": (2, 256, 4096),
        "y": (2, 768),
        "guidance": (2,),
    }
    assert request.positive["guidance"].tolist() == [2.0, 2.0]
    assert request.negative is None
    assert torch.equal(request.timesteps, request.sigmas)
    assert len(request.sigmas) == 5
    scaled = model.model.latent_format.process_in(request.noise)
    assert torch.allclose(finish(scaled), request.noise, atol=1e-5)


def test_unknown_family_is_named(comfyui, tmp_path):
    from comfy_xdit.comfy_types.model.handles import model_of

    file = _write_header(tmp_path / "strange.safetensors", {"strange.weight": torch.empty(3, 3)})
    with pytest.raises(
        InvalidInput, match=r"does not recognise the diffusion model in .*strange\.safetensors"
    ):
        model_of(_remote(file))
