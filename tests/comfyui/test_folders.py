"""Models of diffusers folders in a real ComfyUI: stock samplers draw what diffusers' own loop draws."""

from __future__ import annotations

import inspect
import shutil
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.layouts import LAYOUTS, PIPELINES
from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.sampling import LAST_SIGNAL
from comfy_xdit.protocol.spec import ModelSpec
from comfy_xdit.remote.model import RemoteModel
from tests import tiny
from tests.comfyui import loras
from tests.comfyui.inputs import conditioning_for, empty_latent, relative_l2
from tests.folder_cases import FOLDERS, FolderCase, drawn
from worker.models.flux.family import Flux

PER_RUN = 1e-4
STEPS, CFG, SEED = 8, 3.0, 5
# What a stock CONDITIONING calls the arguments; what is nowhere here ComfyUI makes of the latent's size.
OPTIONS = {
    "attention_mask": "attention_mask", "text_embedding_mask": "attention_mask", "y": "pooled_output",
    "encoder_hidden_states_t5": "conditioning_mt5xl", "text_embedding_mask_t5": "attention_mask_mt5xl",
    "class_labels": "class_labels", "id_cond": "id_cond", "id_vit_hidden": "id_vit_hidden",
}  # fmt: skip


def _model(folder: Any, layout: str) -> Any:
    from comfy_xdit.comfy_types.model.handles import model_of

    remote = RemoteModel(ModelSpec.of(folder, "transformer"), (LAYOUTS | PIPELINES)[layout])
    remote.load()
    return model_of(remote)


def _conditioning(given: dict[str, Any], row: int, image: torch.Tensor | None) -> list[Any]:
    """What a stock graph would have for one row of a case's conditions."""
    options: dict[str, Any] = {}
    for name, value in given.items():
        if name in OPTIONS:
            cut = [one[row : row + 1] for one in value] if isinstance(value, list) else value[row : row + 1]
            options[OPTIONS[name]] = cut
    if "guidance" in given:
        options["guidance"] = float(given["guidance"][row])
    if "clip_fea" in given:
        hidden = given["clip_fea"][row : row + 1]
        options["clip_vision_output"] = SimpleNamespace(penultimate_hidden_states=hidden)
    if image is not None:
        options["concat_latent_image"] = image
    context = given["context"][row : row + 1] if "context" in given else torch.zeros(1, 1, 1)
    return [[context, options]]


def _scaling(case: FolderCase) -> tuple[float, Any, Any]:
    """As diffusers' pipelines scale latents: (latent - mean) * scale / std."""
    mean, std = (torch.tensor(case.vae[k]).view(1, -1, 1, 1, 1) if k in case.vae else d
                 for k, d in (("latents_mean", 0.0), ("latents_std", 1.0)))  # fmt: skip
    return case.vae.get("scaling_factor", 1.0), mean, std


class Loop:
    """diffusers' own: its scheduler, and guidance as its pipelines compute it."""

    def __init__(self, case: FolderCase):
        import diffusers

        made = getattr(diffusers, case.scheduler["_class_name"])
        flow = "beta_start" not in case.scheduler
        words = {name: value for name, value in case.scheduler.items() if name != "_class_name"}
        if flow:  # Euler's method, whatever the folder's own is
            shift = words.get("flow_shift", words.get("shift"))
            made, words = diffusers.FlowMatchEulerDiscreteScheduler, {"shift": shift}
            words |= {"invert_sigmas": True} if case.scheduler.get("invert_sigmas") else {}
        else:
            words |= {"timestep_spacing": "trailing", "clip_sample": False}
        self._case, self._scheduler = case, made(**words)
        self._scheduler.set_timesteps(STEPS)
        times = self._scheduler.timesteps
        if flow:
            sigmas = self._scheduler.sigmas
            self.sigmas = 1.0 - sigmas if "invert_sigmas" in words else sigmas
        else:
            signal = self._scheduler.alphas_cumprod
            if signal[-1] == 0.0:  # where diffusers has noise alone, ComfyUI has a rest
                signal[-1] = LAST_SIGNAL
            signal = signal[times.long()].double()
            self.sigmas = torch.cat([((1 - signal) / signal).sqrt().float(), torch.zeros(1)])

    def draw(self, module: Any, noise: torch.Tensor, given: dict[str, Any], beside: Any) -> torch.Tensor:
        """The latent, as the transformer knows it; row 0 of `given` is positive, 1 negative."""
        x, backwards = noise, self._scheduler.config.get("invert_sigmas")
        for time in self._scheduler.timesteps:
            both = torch.cat([x, x])
            if beside is not None:
                both = torch.cat([both, torch.cat([beside, beside])], 1)
            # The reference of a case takes ComfyUI's time, and gives ComfyUI's direction.
            shown = 1000.0 - time if backwards else time
            out = self._case.reference(module, both, shown.float().expand(2), given)
            out = -out if backwards else out
            guided = out[1:] + CFG * (out[:1] - out[1:])
            x = self._scheduler.step(guided, time, x, return_dict=False)[0]
        return x


@pytest.mark.parametrize("name", FOLDERS, ids=lambda name: name.replace(" ", ""))
@pytest.mark.parametrize("layout", ["CFG 2"], ids=["CFG2"])
def test_a_run_of_a_stock_sampler_is_diffusers_own(comfyui, run_node, folders, name, layout, models_table):
    import comfyui_version

    case, (module, folder) = FOLDERS[name], folders(name)
    model = _model(folder, layout)
    given = case.conditions(2)
    image, beside = _picture(case)
    loop = Loop(case)
    latent = {"samples": torch.zeros(1, *case.shape[1:])}
    (sampler,) = run_node("KSamplerSelect", sampler_name="euler")

    drawn_latent = run_node(
        "SamplerCustom", model=model, add_noise=True, noise_seed=SEED, cfg=CFG, sampler=sampler,
        positive=_conditioning(given, 0, image), negative=_conditioning(given, 1, image),
        sigmas=loop.sigmas, latent_image=latent,
    )[0]["samples"]  # fmt: skip

    noise = torch.randn(1, *case.shape[1:], generator=torch.manual_seed(SEED))
    scale, mean, std = _scaling(case)
    expected = loop.draw(module, noise, given, beside) * std / scale + mean
    error = relative_l2(drawn_latent, expected)
    assert error <= PER_RUN
    models_table.record(name, f"{layout}, ComfyUI {comfyui_version.__version__}", error)


def _picture(case: FolderCase) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """A picture that a video begins with, unscaled, and what the class gets beside the latent."""
    if not case.beside:
        return None, None
    channels, sizes = case.shape[1], case.shape[2:]
    image, (scale, mean, std) = drawn(1, channels, 1, *sizes[1:], seed=9), _scaling(case)
    scaled = (image - mean) * scale / std
    if "Wan" in case.plan:  # four channels of a mask, and as many frames as the video has
        image = image.repeat(1, 1, sizes[0], 1, 1)
        return image, torch.cat([torch.zeros(1, 4, *sizes), scaled.repeat(1, 1, sizes[0], 1, 1)], 1)
    rest = torch.zeros(1, channels, sizes[0] - 1, *sizes[1:])
    return image, torch.cat([scaled, rest], 2)


WRONG = {
    (1, 16, 10, 6): "takes 4 channels beside its latent",
    (1, 3, 1, 10, 6): "takes 4 channels beside its latent",
    (4, 10, 6): "takes 4 channels beside its latent",
    (1, 4, 40, 10, 6): "has 40 latent frames, and the video has ",
}


@pytest.mark.parametrize("shape", WRONG, ids=str)
def test_a_picture_that_does_not_fit_the_video_is_refused(comfyui, run_node, folders, shape):
    name = "CogVideoX 5B I2V"
    model, case = _model(folders(name)[1], "CFG 2"), FOLDERS[name]
    given, image = case.conditions(2), torch.zeros(shape)

    with pytest.raises(InvalidInput, match=f"concat_latent_image .*{WRONG[shape]}"):
        run_node(
            "KSampler", model=model, seed=SEED, steps=1, cfg=CFG, sampler_name="euler", scheduler="simple",
            positive=_conditioning(given, 0, image), negative=_conditioning(given, 1, image),
            latent_image={"samples": torch.zeros(1, *case.shape[1:])}, denoise=1.0,
        )  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS, ids=lambda name: name.replace(" ", ""))
def test_xdit_sampler_draws_what_ksampler_draws(comfyui, run_node, folders, name):
    model, case = _model(folders(name)[1], "CFG 2"), FOLDERS[name]
    given, (image, _) = case.conditions(2), _picture(case)
    inputs = dict(
        model=model, seed=SEED, steps=3, cfg=CFG, sampler_name="dpmpp_2m", scheduler="sgm_uniform",
        positive=_conditioning(given, 0, image), negative=_conditioning(given, 1, image),
        latent_image={"samples": torch.zeros(1, *case.shape[1:])}, denoise=1.0,
    )  # fmt: skip

    (expected,) = run_node("KSampler", **inputs)
    answer = run_node("XDiTSampler", **inputs)

    notes = answer["ui"]["text"] if isinstance(answer, dict) else []
    actual = answer["result"][0] if isinstance(answer, dict) else answer[0]
    assert relative_l2(actual["samples"], expected["samples"]) <= PER_RUN
    # A model with channels beside its latent is sampled from the host, and the node says so.
    assert bool(notes) == bool(case.beside), notes


def test_the_twin_is_of_comfyuis_own_class_where_it_has_one(comfyui, folders):
    import comfy.model_base

    known = {"Wan 2.1 T2V": "WAN21", "HunyuanVideo": "HunyuanVideo", "HunyuanDiT": "HunyuanDiT"}
    for name, of_class in known.items():
        twin = _model(folders(name)[1], "1 rank").model
        assert type(twin) is getattr(comfy.model_base, of_class)
    assert "extra_conds" in inspect.getsource(type(_model(folders("SANA")[1], "1 rank").model))


# What a call has in channels: the latent, a picture and its mask; the latent and a picture.
TOOLS = {"Fill": 384, "Canny and Depth": 128}


@pytest.mark.parametrize("tool", TOOLS, ids=["Fill", "Depth"])
@pytest.mark.parametrize("layout", ["CFG 2", "Ulysses 2"], ids=["CFG2", "Ulysses2"])
def test_tools_of_flux_from_a_folder_are_stock(comfyui, run_node, tiny_flux, tmp_path, tool, layout):
    config = {**tiny.FLUX_CONFIG, "in_channels": TOOLS[tool], "out_channels": 64}
    name = "flux_tool.safetensors"
    with torch.inference_mode(False):
        module = tiny.build(Flux(), config)
        module.save_pretrained(tmp_path / "transformer")
        tiny.write_native(Flux(), module, config, comfyui.models / "diffusion_models" / name)
    (stock,) = run_node("UNETLoader", unet_name=name, weight_dtype="default")
    picture = {"concat_latent_image": drawn(1, 16, 9, 14, seed=2), "concat_mask": torch.ones(1, 1, 72, 112)}
    picture["concat_mask"][..., :50] = 0.0
    sides = [conditioning_for(config, seed, **picture) for seed in (3, 4)]

    def draw(node: str, model: Any) -> torch.Tensor:
        answer = run_node(
            node, model=model, seed=SEED, steps=2, cfg=CFG, sampler_name="euler", scheduler="simple",
            positive=sides[0], negative=sides[1], latent_image=empty_latent(1, 9, 14), denoise=1.0,
        )  # fmt: skip
        return (answer["result"] if isinstance(answer, dict) else answer)[0]["samples"]

    expected, ours = draw("KSampler", stock), _model(tmp_path / "transformer", layout)
    assert relative_l2(draw("KSampler", ours), expected) <= PER_RUN
    assert relative_l2(draw("XDiTSampler", ours), expected) <= PER_RUN
    (comfyui.models / "diffusion_models" / name).unlink()


def test_a_class_label_prompts_dit(comfyui, run_node, folders):
    model, case = _model(folders("DiT-XL")[1], "CFG 2"), FOLDERS["DiT-XL"]

    def draw(label: int) -> torch.Tensor:
        positive, negative = (run_node("XDiTClassLabel", class_label=n)[0] for n in (label, -1))
        return run_node(
            "KSampler", model=model, seed=SEED, steps=2, cfg=CFG, sampler_name="ddim", scheduler="normal",
            positive=positive, negative=negative, latent_image={"samples": torch.zeros(1, *case.shape[1:])},
            denoise=1.0,
        )[0]["samples"]  # fmt: skip

    assert relative_l2(draw(4), draw(5)) > 1e-3
    with pytest.raises(InvalidInput, match=r"class labels .* are not all among the 9"):
        draw(9)


def test_an_empty_latent_of_another_model_gets_the_models_size(comfyui, run_node, folders):
    """From 0.33 on an empty LATENT says how much smaller it is than its picture; SANA's is 32 times."""
    model, case = _model(folders("SANA")[1], "1 rank"), FOLDERS["SANA"]
    given = case.conditions(2)
    (latent,) = run_node("EmptyLatentImage", width=320, height=256, batch_size=1)
    resized = "downscale_ratio_spacial" in latent
    (drawn_latent,) = run_node(
        "KSampler", model=model, seed=SEED, steps=1, cfg=1.0, sampler_name="euler", scheduler="simple",
        positive=_conditioning(given, 0, None), negative=_conditioning(given, 1, None), latent_image=latent,
        denoise=1.0,
    )  # fmt: skip
    assert tuple(drawn_latent["samples"].shape) == ((1, 4, 8, 10) if resized else (1, 4, 32, 40))


@pytest.mark.parametrize("name", ["Wan 2.1 T2V", "CogVideoX"], ids=["Wan", "CogVideoX"])
def test_a_lora_does_what_it_would_do_merged(comfyui, run_node, folders, tmp_path, name):
    """In peft's names, by the ranks; in kohya's by the stock node and by the ranks."""
    case, (module, folder) = FOLDERS[name], folders(name)
    model = _model(folder, "CFG 2")
    with torch.inference_mode(False):
        peft, kohya = loras.diffusers(module, 3), loras.native(model, "lora", 4)
        for file, tensors in (("peft", peft), ("kohya", kohya)):
            save_file(tensors, comfyui.models / "loras" / f"{file}.safetensors")
        merged = case.build().requires_grad_(False)
        for key, layer in merged.named_modules():
            if isinstance(layer, torch.nn.Linear):
                up, down = (peft[f"transformer.{key}.lora_{side}.weight"] for side in "BA")
                layer.weight += 2.0 / loras.RANK * up @ down
        shutil.copytree(folder, tmp_path / "merged")
        merged.save_pretrained(tmp_path / "merged" / "transformer")

    def draw(model: Any) -> torch.Tensor:
        given = case.conditions(2)
        return run_node(
            "KSampler", model=model, seed=SEED, steps=2, cfg=CFG, sampler_name="euler", scheduler="simple",
            positive=_conditioning(given, 0, None), negative=_conditioning(given, 1, None),
            latent_image={"samples": torch.zeros(1, *case.shape[1:])}, denoise=1.0,
        )[0]["samples"]  # fmt: skip

    def loaded(node: str, file: str) -> torch.Tensor:
        inputs = {"model": model, "lora_name": f"{file}.safetensors", "strength_model": 1.0}
        answer = run_node(node, **inputs)
        return draw((answer["result"] if isinstance(answer, dict) else answer)[0])

    without, expected = draw(model), draw(_model(tmp_path / "merged", "CFG 2"))
    assert relative_l2(without, expected) > 1e-3
    assert relative_l2(loaded("XDiTLoraLoader", "peft"), expected) <= PER_RUN
    by_host = loaded("LoraLoaderModelOnly", "kohya")
    assert relative_l2(by_host, without) > 1e-3
    assert relative_l2(loaded("XDiTLoraLoader", "kohya"), by_host) <= PER_RUN


def test_stages_of_a_model_with_long_skips_say_what_they_cost(comfyui, run_node, folders):
    case = FOLDERS["HunyuanDiT"]
    model, given = _model(folders("HunyuanDiT")[1], "PipeFusion 2"), case.conditions(2)
    answer = run_node(
        "XDiTSampler", model=model, seed=SEED, steps=2, cfg=CFG, sampler_name="euler", scheduler="simple",
        positive=_conditioning(given, 0, None), negative=_conditioning(given, 1, None),
        latent_image={"samples": torch.zeros(1, *case.shape[1:])}, denoise=1.0,
    )  # fmt: skip
    assert "outputs of early blocks" in answer["ui"]["text"][0]
