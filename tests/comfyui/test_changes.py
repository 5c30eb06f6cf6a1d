"""Ways in which nodes of other packs change a model from outside: refused by name, none in silence."""

import types
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch

from comfy_xdit.protocol.errors import InvalidInput
from tests.comfyui.inputs import FAMILIES, empty_latent, layout, random_conditioning

BLOCKS = {"sd3": "joint_blocks", "flux": "double_blocks"}
CORE = {"sd3": "forward_core_with_concat", "flux": "forward_orig"}
FIRST = {"sd3": "context_embedder", "flux": "img_in"}


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture
def model(request, run_node, family) -> Any:
    """A MODEL on one rank, of a twin that no other test has."""
    name = request.getfixturevalue(f"tiny_{family}")
    inputs = {"unet_name": name, "weight_dtype": "default", "parallel": layout(1)}
    (model,) = run_node("XDiTLoadDiffusionModel", **inputs)
    return model


def _sample(run_node, model, sampler: str = "KSampler") -> torch.Tensor:
    (latent,) = run_node(
        sampler, model=model, seed=1, steps=1, cfg=1.0, sampler_name="euler", scheduler="simple",
        denoise=1.0, latent_image=empty_latent(1, 8, 8),
        positive=random_conditioning(model, 1), negative=random_conditioning(model, 2),
    )  # fmt: skip
    return latent["samples"]


def _nothing(*_: Any, **__: Any) -> None:
    """A function to put in the place of another."""


# ---------------------------------------------------------------------- before a run


def _blocks(transformer: Any, family: str) -> torch.nn.ModuleList:
    return getattr(transformer, BLOCKS[family])


def _swap(transformer: Any, family: str) -> None:
    blocks = _blocks(transformer, family)
    blocks[0], blocks[1] = blocks[1], blocks[0]


def _replace_weight(transformer: Any, family: str) -> None:
    layer = getattr(transformer, FIRST[family])
    layer.weight = torch.nn.Parameter(torch.zeros(layer.weight.shape), requires_grad=False)


# What is done, and the words of the refusal; {blocks}, {core} and {first} are the family's names.
BEFORE: dict[str, tuple[Callable[[Any, str], Any], str]] = {
    "core": (lambda dm, family: setattr(dm, CORE[family], types.MethodType(_nothing, dm)), r"\.{core}"),
    "forward": (lambda dm, _: setattr(dm, "forward", _nothing), r"diffusion_model\.forward\)"),
    "our own function": (
        lambda dm, _: setattr(dm, "_forward" if hasattr(dm, "_forward") else "forward", _nothing),
        r"diffusion_model\._?forward",
    ),
    "forward of a block": (
        lambda dm, family: setattr(_blocks(dm, family)[1], "forward", _nothing),
        r"{blocks}\.1\.forward",
    ),
    "hook": (
        lambda dm, family: _blocks(dm, family)[0].register_forward_hook(_nothing),
        r"a hook of diffusion_model\.{blocks}\.0",
    ),
    "hook before": (
        lambda dm, family: getattr(dm, FIRST[family]).register_forward_pre_hook(_nothing),
        r"a hook of diffusion_model\.{first}",
    ),
    "other layer": (lambda dm, _: setattr(dm, "final_layer", torch.nn.Identity()), r"\.final_layer"),
    "block more": (lambda dm, family: _blocks(dm, family).append(torch.nn.Identity()), r"{blocks}\.\d"),
    "block fewer": (lambda dm, family: _blocks(dm, family).pop(-1), r"{blocks}\.\d"),
    "blocks swapped": (_swap, r"{blocks}\.0, diffusion_model\.{blocks}\.1"),
    "other weight": (_replace_weight, r"{first}\.weight"),
    "weight deleted": (lambda dm, family: delattr(getattr(dm, FIRST[family]), "bias"), r"{first}\.bias"),
    "plain attribute": (lambda dm, _: setattr(dm, "patch_size", 7), r"\.patch_size"),
    "compiled in place": (lambda dm, _: dm.compile(), "_compiled_call_impl"),
}


@pytest.mark.parametrize("way", BEFORE)
@pytest.mark.parametrize("sampler", ["KSampler", "XDiTSampler"])
def test_a_change_before_the_run_is_refused(run_node, model, family, way, sampler):
    change, words = BEFORE[way]
    _sample(run_node, model, sampler)

    change(model.model.diffusion_model, family)

    words = words.replace("{blocks}", BLOCKS[family]).replace("{core}", CORE[family])
    with pytest.raises(
        InvalidInput, match=f"inside of the transformer.*{words.replace('{first}', FIRST[family])}"
    ):
        _sample(run_node, model.clone(), sampler)


def test_a_transformer_in_place_of_the_transformer_is_refused(run_node, model):
    whole = model.model.diffusion_model
    model.model.diffusion_model = torch.nn.Sequential(whole)  # as torch.compile(...) would be

    with pytest.raises(InvalidInput, match=r"inside of the transformer \(diffusion_model\)"):
        model.refuse_what_stays_here()

    model.model.diffusion_model = whole
    _sample(run_node, model)  # nothing is lost


def test_an_attribute_that_means_nothing_to_the_class_may_be_set(run_node, model):
    """Packs keep notes there."""
    before = _sample(run_node, model)
    model.model.diffusion_model.notes_of_a_pack = {"threshold": 0.3}

    for sampler in ("KSampler", "KSampler"):
        assert torch.equal(_sample(run_node, model, sampler), before)


# ---------------------------------------------------------------------- during a run


@pytest.mark.parametrize("what", ["core", "blocks", "block"])
def test_a_change_for_the_time_of_a_call_is_refused(run_node, model, family, what):
    """As model function wrappers of TeaCache, PuLID and others make it."""
    transformer = model.model.diffusion_model
    blocks = _blocks(transformer, family)
    target, name, new = {
        "core": (transformer, CORE[family], _nothing),
        "blocks": (transformer, BLOCKS[family], torch.nn.ModuleList(list(blocks)[:-1])),
        "block": (blocks[0], "forward", _nothing),
    }[what]

    def wrapper(apply_model, args):
        with mock.patch.object(target, name, new):
            return apply_model(args["input"], args["timestep"], **args["c"])

    before = _sample(run_node, model)
    changed = model.clone()
    changed.set_model_unet_function_wrapper(wrapper)

    with pytest.raises(InvalidInput, match=rf"inside of the transformer \(.*{name}"):
        _sample(run_node, changed)
    assert torch.equal(_sample(run_node, model), before)  # nothing is lost


def test_a_layer_that_is_called_by_itself_is_refused(run_node, model, family):
    layer = getattr(model.model.diffusion_model, FIRST[family])

    def wrapper(apply_model, args):
        layer(torch.zeros(1, 1, layer.weight.shape[1]))

    changed = model.clone()
    changed.set_model_unet_function_wrapper(wrapper)

    with pytest.raises(
        InvalidInput, match=rf"diffusion_model\.{FIRST[family]}\.(weight|bias) is a weight of an"
    ):
        _sample(run_node, changed)


# ---------------------------------------------------------------------- weights

WEIGHT: dict[str, Callable[[torch.nn.Parameter], Any]] = {
    "data.mul_": lambda weight: weight.data.mul_(2.0),
    "mul_": lambda weight: weight.mul_(2.0),
    "copy_": lambda weight: weight.copy_(torch.zeros(weight.shape)),
    "copied from": lambda weight: torch.zeros(weight.shape).copy_(weight),
    "data": lambda weight: setattr(weight, "data", torch.zeros(weight.shape)),
    "item": lambda weight: weight[0, 0],
    "part set": lambda weight: weight.__setitem__(0, 1.0),
    "float": lambda weight: float(weight.mean()),
    "compared": lambda weight: torch.equal(weight, weight),
    "numpy": lambda weight: weight.detach().cpu().numpy(),
    "tolist": lambda weight: weight.tolist(),
    "to": lambda weight: weight.to("cpu"),
    "cast": lambda weight: weight.half(),
    "multiplied": lambda weight: torch.ones(1, weight.shape[0]) @ weight,
}


@pytest.mark.parametrize("way", WEIGHT)
def test_numbers_of_a_weight_are_refused_by_its_name(model, family, way):
    weight = getattr(model.model.diffusion_model, FIRST[family]).weight
    state = model.model.state_dict()[f"diffusion_model.{FIRST[family]}.weight"]

    for given in (weight, state):
        assert given.is_meta and given.dtype.is_floating_point and given.numel() == given.shape.numel()
        with (
            torch.inference_mode(),
            pytest.raises(InvalidInput, match=rf"diffusion_model\.{FIRST[family]}\.weight"),
        ):
            WEIGHT[way](given)


@pytest.mark.parametrize("way", ["half", "bfloat16", "cpu", "double"])
@pytest.mark.parametrize("part", ["model", "transformer"])
def test_casting_or_moving_the_model_is_refused_and_changes_nothing(run_node, model, way, part):
    before = _sample(run_node, model)
    clone = model.clone().model
    owner = clone if part == "model" else clone.diffusion_model

    with pytest.raises(InvalidInput, match=r"is a weight of an xDiT MODEL.*neither be read"):
        getattr(owner, way)()

    assert clone.model_sampling.sigmas.dtype == torch.float32
    assert torch.equal(_sample(run_node, model), before)


def test_extracting_a_lora_is_refused(run_node, comfyui, model, tmp_path, monkeypatch):
    import folder_paths

    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    with pytest.raises(InvalidInput, match=r"extracting weights \(LoraSave\).*stock loader node"):
        run_node(
            "LoraSave", filename_prefix="x", rank=1, lora_type="standard", bias_diff=False, model_diff=model
        )
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------- through stock nodes


@pytest.mark.parametrize("sampler", ["KSampler", "XDiTSampler"])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_another_compute_dtype_is_refused(run_node, model, sampler, dtype):
    (changed,) = run_node("ModelComputeDtype", model=model, dtype=dtype)

    with pytest.raises(InvalidInput, match=r"computing in torch\.\w+16 \(ModelComputeDtype\).*weight_dtype"):
        _sample(run_node, changed, sampler)
    _sample(run_node, model, sampler)  # nothing is lost


@pytest.mark.parametrize("sampler", ["KSampler", "XDiTSampler"])
@pytest.mark.parametrize("dtype", ["fp32", "default"])
def test_the_compute_dtype_of_the_ranks_may_be_asked_for(run_node, model, sampler, dtype):
    (changed,) = run_node("ModelComputeDtype", model=model, dtype=dtype)

    assert torch.equal(_sample(run_node, changed, sampler), _sample(run_node, model, sampler))


def test_the_dtype_that_weights_are_cast_to_counts(run_node, tiny_sd3, monkeypatch):
    """A CPU computes bf16 weights of ComfyUI's own class in fp32."""
    from comfy_xdit.comfy_types.choice import FORCED

    monkeypatch.setenv(FORCED, "comfyui")
    inputs = {"unet_name": tiny_sd3, "weight_dtype": "bf16", "parallel": layout(1)}
    (model,) = run_node("XDiTLoadDiffusionModel", **inputs)
    assert model.model.manual_cast_dtype == torch.float32
    before = _sample(run_node, model)

    def changed(dtype: str) -> Any:
        return run_node("ModelComputeDtype", model=model, dtype=dtype)[0]

    assert torch.equal(_sample(run_node, changed("fp32")), before)
    for dtype in ("bf16", "default"):
        with pytest.raises(InvalidInput, match=r"computing in torch\.bfloat16 \(ModelComputeDtype\)"):
            _sample(run_node, changed(dtype))
    assert torch.equal(_sample(run_node, model), before)
