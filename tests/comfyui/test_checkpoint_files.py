"""What the loaders list, and what of it they refuse: damaged, mixed-up and foreign checkpoints."""

from __future__ import annotations

import asyncio
import importlib
import time
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file

from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.ranks.registry import running_groups
from tests.comfyui.inputs import layout
from tests.comfyui.tiny_checkpoints import MODEL, save, write

pytestmark = pytest.mark.usefixtures("checkpoints")

SECONDS = 2.0  # in which a file is refused
Tensors = dict[str, torch.Tensor]
LISTS = {
    "XDiTLoadCheckpoint": ("checkpoints", "ckpt_name"),
    "XDiTLoadDiffusionModel": ("diffusion_models", "unet_name"),
    "XDiTLoadVAE": ("vae", "vae_name"),
    "XDiTLoraLoader": ("loras", "lora_name"),
    "XDiTControlNetLoader": ("controlnet", "control_net_name"),
}
NOT_LISTED = {
    "old.ckpt": "old.ckpt is a pickle file, which can run code; convert it",
    "old.pt": "old.pt is a pickle file, which can run code; convert it",
    "OLD.BIN": "OLD.BIN is a pickle file, which can run code; convert it",
    "old.pkl": "old.pkl is a pickle file, which can run code; convert it",
    "none.safetensors": "'none.safetensors'; put it into models/",
}


@pytest.fixture(scope="module")
def whole(checkpoints) -> Tensors:
    """The tensors of a good file."""
    return load_file(checkpoints / write("sd15", checkpoints, file="good"))


# ---------------------------------------------------------------------- lists


@pytest.mark.parametrize("node", LISTS)
def test_a_loader_lists_what_it_can_load_and_says_why_of_the_rest(comfyui, run_node, node):
    kind, widget = LISTS[node]
    for name in (*NOT_LISTED, "new.sft"):
        if name != "none.safetensors":
            (comfyui.models / kind / name).write_bytes(b"\x80\x04.")

    names = comfyui.mappings[node].INPUT_TYPES()["required"][widget][0]

    assert "new.sft" in names
    assert [name for name in names if not name.endswith((".safetensors", ".sft"))] == []
    check = comfyui.mappings[node].VALIDATE_INPUTS
    assert check(**{widget: "new.sft"}) is True and check() is True
    for name, why in NOT_LISTED.items():
        assert why in check(**{widget: name})
        needed = {"model": None, "strength_model": 1.0} if node == "XDiTLoraLoader" else {}
        if not needed:
            with pytest.raises(InvalidInput, match=r"pickle file|put it into"):
                run_node(node, **{widget: name}, **_dtype(node))


def _dtype(node: str) -> dict[str, str]:
    return {"weight_dtype": "default"} if node == "XDiTLoadDiffusionModel" else {}


def test_a_path_out_of_the_folder_is_none_of_the_names(comfyui, checkpoints, tmp_path):
    save({"a": torch.ones(1)}, tmp_path / "elsewhere.safetensors")
    check = comfyui.mappings["XDiTLoadCheckpoint"].VALIDATE_INPUTS

    for name in (str(tmp_path / "elsewhere.safetensors"), f"../../{tmp_path.name}/elsewhere.safetensors"):
        assert isinstance(check(ckpt_name=name), str)


def test_a_queued_prompt_is_refused_with_the_reason(comfyui, checkpoints):
    """As the server checks it before anything runs."""
    execution = importlib.import_module("execution")
    (checkpoints / "queued.ckpt").write_bytes(b"\x80\x04.")
    graph = {
        "1": {"class_type": "XDiTLoadCheckpoint", "inputs": {"ckpt_name": "queued.ckpt"}},
        "2": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["1", 2]}},
        "3": {
            "class_type": "EmptyLatentImage",
            "inputs": {"width": 64, "height": 64, "batch_size": 1},
        },
        "4": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "x"}},
    }

    answer = asyncio.run(execution.validate_prompt("1", graph, None))

    assert answer[0] is False
    (error,) = answer[3]["1"]["errors"]
    assert error["type"] == "custom_validation_failed"
    assert "queued.ckpt is a pickle file, which can run code; convert it" in error["details"]


# ---------------------------------------------------------------------- bad files


def without(whole: Tensors, name: str) -> Tensors:
    return {key: tensor for key, tensor in whole.items() if key != name}


def only(whole: Tensors, prefix: str) -> Tensors:
    return {key: tensor for key, tensor in whole.items() if key.startswith(prefix)}


NORM = f"{MODEL}middle_block.0.in_layers.0.weight"
CONV = f"{MODEL}middle_block.0.out_layers.3.weight"
WRONG: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "a VAE": (lambda t: only(t, "first_stage_model."), "does not recognise the diffusion model"),
    "text encoders": (lambda t: only(t, "cond_stage_model."), "does not recognise the diffusion model"),
    "a LoRA": (
        lambda _: {"lora_unet_x.lora_up.weight": torch.ones(2, 2)},
        "does not recognise the diffusion model",
    ),
    "nothing": (lambda _: {}, "does not recognise the diffusion model"),
    "a tensor is missing": (lambda t: without(t, NORM), r"lacks the tensor middle_block\.0\.in_layers"),
    "of another shape": (lambda t: t | {CONV: torch.ones(64, 32, 3, 3)}, "does not fit ComfyUI's UNetModel"),
    "two models": (lambda t: t | {NORM.removeprefix("model."): torch.ones(64)}, "twice"),
    "no number": (
        lambda t: t | {CONV: torch.full((64, 64, 3, 3), float("nan"))},
        "",  # it loads, and the call says so
    ),
}


def test_a_bad_checkpoint_is_refused_and_what_is_loaded_goes_on(run_node, checkpoints, whole):
    given = {"parallel": layout(1)}
    model, clip, _ = run_node("XDiTLoadCheckpoint", ckpt_name="good.safetensors", **given)
    (prompt,) = run_node("CLIPTextEncode", clip=clip, text="a circle")

    def drawn(one) -> torch.Tensor:
        (latent,) = run_node(
            "KSampler", model=one, positive=prompt, negative=prompt, seed=1, steps=1, cfg=1.0,
            sampler_name="euler", scheduler="normal", denoise=1.0,
            latent_image={"samples": torch.zeros(1, 4, 8, 8)},
        )  # fmt: skip
        return latent["samples"]

    before, pids = drawn(model), [group.pids for group in running_groups()]
    good = (checkpoints / "good.safetensors").read_bytes()
    damaged = {"cut": good[:-1000], "header": good[:100], "empty": b"", "text": b"<html>" * 100}
    for name, content in damaged.items():
        (checkpoints / f"bad_{name}.safetensors").write_bytes(content)
    for name, (change, _) in WRONG.items():
        save(change(whole), checkpoints / f"bad_{name}.safetensors")
    expected = dict.fromkeys(damaged, "is damaged or not a safetensors file") | {
        name: why for name, (_, why) in WRONG.items()
    }

    for name, why in expected.items():
        begin = time.monotonic()
        with pytest.raises(InvalidInput, match=why or "values that are not finite"):
            bad, *_ = run_node("XDiTLoadCheckpoint", ckpt_name=f"bad_{name}.safetensors", **given)
            drawn(bad)
        assert time.monotonic() - begin < SECONDS or not why, name

    assert [group.pids for group in running_groups()] == pids
    assert torch.equal(drawn(model), before)


def test_a_text_encoder_of_another_shape_is_said_in_stocks_words(run_node, checkpoints, whole):
    key = next(key for key in whole if key.endswith("layers.0.mlp.fc1.weight"))
    save(whole | {key: torch.ones(3, 3)}, checkpoints / "odd_clip.safetensors")

    said = []
    for node in ("XDiTLoadCheckpoint", "CheckpointLoaderSimple"):
        with pytest.raises(RuntimeError) as refused:
            run_node(node, ckpt_name="odd_clip.safetensors")
        said.append(str(refused.value))
    assert said[0] == said[1] and "size mismatch" in said[0]


def test_a_file_that_is_another_one_by_now_is_refused(comfyui, checkpoints, whole, monkeypatch):
    """Half of one checkpoint and half of another is neither."""
    import comfy.sd

    from comfy_xdit.comfy_types.surroundings import COMFYUI

    save(whole, checkpoints / "swapped.safetensors")
    spec = COMFYUI.spec_of(checkpoints / "swapped.safetensors", "default", checkpoint=True)
    stock = comfy.sd.load_checkpoint_guess_config

    def swapping(*args, **kwargs):
        save(whole | {"more": torch.ones(9)}, checkpoints / "swapped.safetensors")
        return stock(*args, **kwargs)

    monkeypatch.setattr(comfy.sd, "load_checkpoint_guess_config", swapping)
    with pytest.raises(InvalidInput, match=r"swapped\.safetensors was changed after the node"):
        COMFYUI.clip_and_vae(spec)
