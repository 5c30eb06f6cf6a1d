"""What comfy_xdit.comfy_types relies on in ComfyUI. Every finding is one sentence.

Each check returns the sentences for what has changed, none if all is as known. They run at the
first model of a process, in XDiTStatus, and in the tests of every ComfyUI version.
"""

from __future__ import annotations

import functools
import inspect
import re
import textwrap
from collections.abc import Callable
from typing import Any

import torch

LOAD = "self, device_to=None, lowvram_model_memory=0, force_patch_weights=False, full_load=False"
VAE_TILES = "tile_x=None, tile_y=None, overlap=None, tile_t=None, overlap_t=None"
APPLY = "self, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options={}, **kwargs"
HINT = "self, cond_hint, strength=1.0, timestep_percent_range=(0.0, 1.0), vae=None, extra_concat=[]"
# (owner, function, known spellings from 0.3.64 to 0.38; None where it may be absent, why)
SIGNATURES = [
    ("ModelPatcher", "load", [LOAD], "RemotePatcher overrides it"),
    (
        "ModelPatcher",
        "unpatch_model",
        ["self, device_to=None, unpatch_weights=True"],
        "RemotePatcher overrides it",
    ),
    (
        "ModelPatcher",
        "patch_model",
        ["self, device_to=None, lowvram_model_memory=0, load_weights=True, force_patch_weights=False"],
        "RemotePatcher calls it",
    ),
    (
        "ModelPatcher",
        "partially_load",
        ["self, device_to, extra_memory=0, force_patch_weights=False"],
        "RemotePatcher overrides it",
    ),
    ("ModelPatcher", "pre_run", ["self"], "RemotePatcher sends the patches from then on"),
    (
        "ModelPatcher",
        "add_patches",
        ["self, patches, strength_patch=1.0, strength_model=1.0"],
        "fills the patches that comfy_types.patches describes",
    ),
    ("ModelPatcher", "patch_hooks", ["self, hooks"], "RemotePatcher refuses weight hooks in it"),
    (
        "ModelPatcher",
        "apply_hooks",
        ["self, hooks, transformer_options=None, force_apply=False"],
        "RemotePatcher.load calls it",
    ),
    ("ModelPatcher", "is_dynamic", [None, "self"], "RemotePatcher answers it"),
    (
        "ModelPatcher",
        "deepclone_multigpu",
        [None, "self, new_load_device=None, models_cache=None"],
        "refused",
    ),
    ("BaseModel", "apply_model", [APPLY], "the sampler's way into the twin"),
    ("BaseModel", "memory_required", ["self, input_shape, cond_shapes={}"], "the twin overrides it"),
    ("BASE", "get_model", ["self, state_dict, prefix='', device=None"], "builds the twin"),
    ("model_base", "model_sampling", ["model_config, model_type"], "samples as a diffusers folder says"),
    (
        "BASE",
        "set_inference_dtype",
        ["self, dtype, manual_cast_dtype", "self, dtype, manual_cast_dtype, device=None"],
        "called before get_model",
    ),
    (
        "VAE",
        "__init__",
        ["self, sd=None, device=None, config=None, dtype=None, metadata=None"],
        "builds the VAE",
    ),
    ("VAE", "decode", ["self, samples_in, vae_options={}"], "RemoteVAE overrides it"),
    ("VAE", "decode_tiled", [f"self, samples, {VAE_TILES}"], "its tiles are the ranks' work"),
    (
        "VAE",
        "encode",
        ["self, pixel_samples", "self, pixel_samples, not_video=None"],
        "RemoteVAE overrides it",
    ),
    (
        "VAE",
        "encode_tiled",
        [f"self, pixel_samples, {VAE_TILES}", f"self, pixel_samples, {VAE_TILES}, not_video=None"],
        "its tiles are the ranks' work",
    ),
    ("CLIP", "clone", ["self", "self, disable_dynamic=False"], "everything of ours must survive it"),
    ("CLIP", "tokenize", ["self, text, return_word_ids=False, **kwargs"], "calls PromptReader"),
    ("KSampler", "set_steps", ["self, steps, denoise=None"], "gives XDiTSampler its sigmas"),
    (
        "samplers",
        "encode_model_conds",
        ["model_function, conds, noise, device, prompt_type, **kwargs"],
        "turns XDiTSampler's conditioning into arguments",
    ),
    ("sample", "prepare_noise", ["latent_image, seed, noise_inds=None"], "gives XDiTSampler its noise"),
    ("sampler_helpers", "prepare_mask", ["noise_mask, shape, device"], "gives XDiTSampler its mask"),
    (
        "model_detection",
        "model_config_from_unet",
        ["state_dict, unet_key_prefix, use_base_if_no_match=False, metadata=None"],
        "finds the family",
    ),
    ("model_management", "unload_all_models", [""], "releases the ranks' models"),
    ("ControlBase", "set_cond_hint", [HINT], "RemoteControl overrides it"),
    ("ControlBase", "pre_run", ["self, model, percent_to_timestep_function"], "RemoteControl overrides it"),
    ("ControlBase", "copy_to", ["self, c"], "RemoteControl copies itself with it"),
    (
        "ControlNet",
        "get_control",
        ["self, x_noisy, t, cond, batched_number, transformer_options"],
        "RemoteControl has it too",
    ),
    (
        "controlnet",
        "broadcast_image_to",
        ["tensor, target_batch_size, batched_number"],
        "gives each row of a batch its hint",
    ),
]
TOUCHES_WEIGHTS = re.compile(
    r"self\.model\.to\(|patch_weight_to_device\(|_load_list\(|copy_to_param\(|set_attr_param\(|"
    r"\.patch_weight|pin_weight_to_device\(|m\.to\(|_zero_init|materialize|HostBuffer"
)
# Only reached from methods that RemotePatcher overrides.
UNREACHED = {
    "patch_weight_to_device",
    "_load_list",
    "patch_cached_hook_weights",
    "patch_hook_weight_to_device",
    "clear_cached_hook_weights",
}
# A control object is asked before each call, and what it adds to the options goes with the call.
CONTROL_CALLS = (
    "c['transformer_options'] = transformer_options",
    "control.get_control(input_x, timestep_, c, len(cond_or_uncond), transformer_options)",
)
TRANSFORMER_CALL = (
    "self.diffusion_model(xc, t, context=context, control=control, "
    "transformer_options=transformer_options, **extra_conds)"
)
CLONED = {
    "patcher",
    "cond_stage_model",
    "tokenizer",
    "layer_idx",
    "tokenizer_options",
    "use_clip_schedule",
    "apply_hooks_to_conds",
}


def owners() -> dict[str, Any]:
    """ComfyUI's classes and modules by the names used above."""
    import comfy.controlnet
    import comfy.model_base
    import comfy.model_detection
    import comfy.model_management
    import comfy.model_patcher
    import comfy.sample
    import comfy.sampler_helpers
    import comfy.samplers
    import comfy.sd
    import comfy.supported_models_base

    return {
        "ModelPatcher": comfy.model_patcher.ModelPatcher,
        "BaseModel": comfy.model_base.BaseModel,
        "model_base": comfy.model_base,
        "BASE": comfy.supported_models_base.BASE,
        "VAE": comfy.sd.VAE,
        "CLIP": comfy.sd.CLIP,
        "ControlBase": comfy.controlnet.ControlBase,
        "ControlNet": comfy.controlnet.ControlNet,
        "controlnet": comfy.controlnet,
        "KSampler": comfy.samplers.KSampler,
        "samplers": comfy.samplers,
        "sample": comfy.sample,
        "sampler_helpers": comfy.sampler_helpers,
        "model_detection": comfy.model_detection,
        "model_management": comfy.model_management,
    }


def signatures() -> list[str]:
    """Functions that are called or overridden are spelled as known."""
    found = []
    for owner, name, known, why in SIGNATURES:
        function = vars(owners()[owner]).get(name)
        if function is None:
            if None not in known:
                found.append(f"{owner}.{name} is gone from this ComfyUI ({why}).")
            continue
        spelled = _spelled(inspect.signature(function))
        if spelled not in known:
            found.append(f"{owner}.{name} has the signature ({spelled}), which is not known ({why}).")
    return found


def weights_are_left_alone() -> list[str]:
    """No method of the stock patcher moves, pins or creates weights of the twin."""
    from comfy_xdit.comfy_types.model.patcher import RemotePatcher

    stock = owners()["ModelPatcher"]
    return [
        f"ModelPatcher.{name} moves, pins or creates weights, and RemotePatcher does not override it."
        for name, function in vars(stock).items()
        if inspect.isfunction(function)
        and TOUCHES_WEIGHTS.search(_source(function))
        and name not in vars(RemotePatcher).keys() | UNREACHED
    ]


def transformer_call() -> list[str]:
    """The call that the ranks answer has the arguments they expect."""
    if TRANSFORMER_CALL in _source(owners()["BaseModel"]._apply_model):
        return []
    return [
        f"BaseModel._apply_model no longer calls {TRANSFORMER_CALL}: the ranks would get other arguments."
    ]


def models_without_a_class() -> list[str]:
    """A BaseModel can be built around a transformer that is put in afterwards."""
    from comfy_xdit.comfy_types.model.described import NO_TRANSFORMER

    source = _source(owners()["BaseModel"].__init__)
    return [
        f"BaseModel no longer has {name}: models of diffusers folders cannot be built."
        for name in NO_TRANSFORMER
        if name not in source
    ]


def control_calls() -> list[str]:
    """ControlNets of the ranks are asked as they expect."""
    source = _source(owners()["samplers"]._calc_cond_batch)
    return [
        f"samplers._calc_cond_batch no longer has {line}: a ControlNet of the ranks would be lost."
        for line in CONTROL_CALLS
        if line not in source
    ]


def host_options() -> list[str]:
    """What is kept on the host as the sampler's own is not read inside a transformer."""
    import comfy.ldm.flux.model
    import comfy.ldm.modules.diffusionmodules.mmdit

    from comfy_xdit.comfy_types.model.options import HOST_OPTIONS

    found = []
    for module in (comfy.ldm.flux.model, comfy.ldm.modules.diffusionmodules.mmdit):
        read = set(re.findall(r"transformer_options(?:\.get\(|\[)['\"](\w+)['\"]", inspect.getsource(module)))
        found += [
            f"{module.__name__} reads transformer_options[{name!r}], which comfy_types does not forward."
            for name in sorted(read & HOST_OPTIONS - {"wrappers"})
        ]
    return found


def twin(model: Any, stock: Any) -> list[str]:
    """The twin of a file against ComfyUI's own model of it: same names and shapes, no weights."""
    ours = model.model.state_dict()
    theirs = stock.model.state_dict()
    found = [
        f"the twin holds {name}, which is no meta tensor."
        for name, t in ours.items()
        if not _is_meta(name, t)
    ]
    found += [
        f"the twin lacks {name}: LoRA could not attach." for name in sorted(theirs.keys() - ours.keys())
    ]
    found += [
        f"the twin has {name}, the stock model has not." for name in sorted(ours.keys() - theirs.keys())
    ]
    found += [
        f"the twin's {name} has shape {tuple(ours[name].shape)}, the stock one's {tuple(t.shape)}."
        for name, t in theirs.items()
        if name in ours and ours[name].shape != t.shape
    ]
    return found


def clip() -> list[str]:
    """A CLIP put together from parts survives cloning, and our parts have what it asks them for."""
    from comfy_xdit.comfy_types.clip import TextEncoders

    stock = owners()["CLIP"]
    source = _source(stock.clone)
    found = []
    if "CLIP(no_init=True)" not in source:
        found.append("CLIP.clone no longer builds CLIP(no_init=True).")
    found += [
        f"CLIP.clone copies a new attribute {name!r}, which clip_of does not set."
        for name in sorted(set(re.findall(r"\bn\.([a-z_]+) =", source)) - CLONED)
    ]
    asked = set(re.findall(r"self\.cond_stage_model\.([a-z_]+)\(", _source(stock)))
    known = {"generate", "decode"}  # text generation: an AttributeError is answer enough
    found += [
        f"CLIP calls cond_stage_model.{name}(), which TextEncoders lacks."
        for name in sorted(asked - known)
        if not hasattr(TextEncoders, name)
    ]
    return found


def adapters() -> list[str]:
    """The kinds of weight patches are those the ranks know; test_lora.py compares their numbers."""
    import comfy.utils
    import comfy.weight_adapter

    from comfy_xdit.comfy_types.model.patches import ADAPTERS

    names = {adapter.name for adapter in comfy.weight_adapter.adapters}
    more, fewer = sorted(names - ADAPTERS.keys()), sorted(ADAPTERS.keys() - names)
    found = [f"comfy.weight_adapter has {name!r}, which the ranks refuse." for name in more]
    found += [f"comfy.weight_adapter no longer has {name!r}." for name in fewer]
    if not hasattr(comfy.utils, "swap_scale_shift"):
        found.append("comfy.utils.swap_scale_shift is gone: LoRA for SD3's last layers would be refused.")
    return found


CHECKS = (
    signatures, weights_are_left_alone, transformer_call, models_without_a_class, control_calls, host_options,
    clip, adapters,
)  # fmt: skip


@functools.cache
def findings() -> tuple[str, ...]:
    """The sentences of all checks; a check that cannot be made is one as well."""
    return tuple(sentence for check in CHECKS for sentence in _outcome(check))


def _outcome(check: Callable[[], list[str]]) -> list[str]:
    try:
        return check()
    except (AttributeError, ImportError, KeyError, OSError, TypeError) as error:
        return [f"{check.__name__} could not be checked ({type(error).__name__}: {error})."]


def _is_meta(name: str, tensor: torch.Tensor) -> bool:
    return tensor.is_meta or not name.startswith("diffusion_model.")


def _spelled(signature: inspect.Signature) -> str:
    """Names and defaults only."""
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    return ", ".join(
        stars.get(p.kind, "") + p.name + ("" if p.default is p.empty else f"={p.default!r}")
        for p in signature.parameters.values()
    )


def _source(thing: Any) -> str:
    return textwrap.dedent(inspect.getsource(thing))
