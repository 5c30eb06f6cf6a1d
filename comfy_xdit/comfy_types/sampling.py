"""XDiTSampler: KSampler's inputs to one Sample message, with KSampler's own noise and schedule."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import comfy.cli_args
import comfy.model_management
import comfy.model_sampling
import comfy.sample
import comfy.sampler_helpers
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy.model_base import BaseModel

from comfy_xdit.comfy_types.latents import fitting
from comfy_xdit.comfy_types.model.controlnet import nets_of_run, runs_in_ranks
from comfy_xdit.comfy_types.model.exact_calls import OPTIONS
from comfy_xdit.comfy_types.model.handles import pictures_of, remote_of
from comfy_xdit.comfy_types.model.options import plain_options, rank_options
from comfy_xdit.comfy_types.model.patcher import COMPUTE_DTYPE, RemotePatcher
from comfy_xdit.comfy_types.model.rope import with_references
from comfy_xdit.nodes.surroundings import SamplerInputs
from comfy_xdit.protocol.description import LatentSpace
from comfy_xdit.protocol.errors import NotInTheLoop
from comfy_xdit.protocol.messages import AppliedControlNet, Progress, Sample

# Object patches that the ranks' loop goes by, or that change nothing of what they do (checked before).
FOLLOWED = ("model_sampling", COMPUTE_DTYPE)
# How ComfyUI samples what a model predicts, and the functions that say so.
PREDICTIONS = {
    "flow": comfy.model_sampling.CONST,
    "epsilon": comfy.model_sampling.EPS,
    "v": comfy.model_sampling.V_PREDICTION,
}
FORMULAS = ("calculate_input", "calculate_denoised", "noise_scaling", "inverse_noise_scaling")
# Methods of ComfyUI's models that the ranks' loop stands for.
AROUND_A_CALL = ("apply_model", "_apply_model", "process_timestep", "scale_latent_inpaint")
# Entries of a conditioning that change when, where or how strongly it counts.
SPECIAL_CONDITIONS = {
    "area": "an area",
    "mask": "a mask",
    "strength": "a strength",
    "hooks": "hooks",
    "control": "a stock ControlNet",
    "gligen": "GLIGEN boxes",
    "start_percent": "a range of steps",
    "end_percent": "a range of steps",
    "clip_start_percent": "a range of steps",
    "clip_end_percent": "a range of steps",
    "additional_models": "a model of its own",
}


def samplers() -> list[str]:
    """Names for the sampler widget."""
    return list(comfy.samplers.KSampler.SAMPLERS)


def schedulers() -> list[str]:
    """Names for the scheduler widget."""
    return list(comfy.samplers.KSampler.SCHEDULERS)


def sample_request(
    model: RemotePatcher, inputs: SamplerInputs
) -> tuple[Sample, Callable[[torch.Tensor], torch.Tensor]]:
    """KSampler's inputs as one message to the ranks.

    Returns:
        The message, and what turns the answer into the samples of a LATENT, unscaled.

    Raises:
        NotInTheLoop: something in the inputs the ranks' loop cannot do, and a stock KSampler can.
    """
    remote = remote_of(model)
    described = remote.described()
    if described.comfyui and remote.parallel.pipefusion_degree == 1:
        raise NotInTheLoop(
            f"the ranks' loop is for diffusers' classes, and {described.family} runs in ComfyUI's own"
        )
    acting = _check_model(model, plain_options if described.comfyui else rank_options)
    inputs.check()
    schedule = comfy.samplers.KSampler(
        model,
        inputs.steps,
        model.load_device,
        inputs.sampler_name,
        inputs.scheduler,
        inputs.denoise,
        model.model_options,
    )
    samples, noise, mask = _beginning(model, inputs.latent_image, inputs.seed, described.latent)
    _check_class(model, mask)

    def conditions(conditioning: list[Any], name: str) -> dict[str, Any]:
        return acting | _conditions(model, conditioning, name, noise, samples, mask, inputs.seed)

    negative = inputs.negative if inputs.guided else None
    positive_nets, negative_nets = _nets(model, inputs.positive, negative, noise)
    request = Sample(
        spec=remote.spec,
        sampler=inputs.sampler_name,
        sigmas=schedule.sigmas,
        latent=samples,
        noise=noise * getattr(model.get_model_object("model_sampling"), "noise_scale", 1.0),
        cfg=inputs.cfg,
        positive=conditions(inputs.positive, "positive"),
        negative=None if negative is None else conditions(negative, "negative"),
        mask=mask,
        **_predicted(model, schedule.sigmas),
        previews=comfy.cli_args.args.preview_method != latent_preview.LatentPreviewMethod.NoPreviews,
        patches=model.weight_patches(),
        positive_nets=positive_nets,
        negative_nets=negative_nets,
        image_prompts=pictures_of(model),
    )
    return request, lambda answer: _finish(model, answer)


def _beginning(
    model: RemotePatcher, latent: dict[str, Any], seed: int, space: LatentSpace
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The scaled latent, the noise and the mask of a run, as stock makes them.

    Raises:
        NotInTheLoop: several latents at once, or of other dimensions than the model's.
    """
    samples = latent["samples"]
    if not isinstance(samples, torch.Tensor):
        raise NotInTheLoop("the latent is several at once, and the ranks' loop takes one")
    samples = fitting(model, latent)
    if samples.ndim != 2 + space.dimensions:
        raise NotInTheLoop(
            f"the latent has shape {tuple(samples.shape)}; the ranks' loop takes {space.shape} of this MODEL"
        )
    noise = comfy.sample.prepare_noise(samples, seed, latent.get("batch_index"))
    mask = latent.get("noise_mask")
    if mask is not None:
        mask = comfy.sampler_helpers.prepare_mask(mask, noise.shape, samples.device)
    if torch.count_nonzero(samples) > 0:  # as stock: an empty latent stays zero
        samples = model.model.process_latent_in(samples)
    return samples, noise, mask


def progress(model: RemotePatcher, steps: int) -> Callable[[Progress], None]:
    """What shows the ranks' progress on the node, with the previews ComfyUI is set to."""
    previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)
    bar = comfy.utils.ProgressBar(steps)

    def show(done: Progress) -> None:
        picture = None
        if previewer is not None and done.preview is not None:
            x0 = done.preview.to(model.load_device)
            picture = previewer.decode_latent_to_preview_image("JPEG", x0)
        bar.update_absolute(done.step, done.steps, picture)

    return show


def _finish(model: RemotePatcher, answer: torch.Tensor) -> torch.Tensor:
    unscaled = model.model.process_latent_out(answer.to(torch.float32))
    return unscaled.to(comfy.model_management.intermediate_device())


def _check_model(
    model: RemotePatcher, travelling: Callable[[dict[str, Any]], dict[str, Any]]
) -> dict[str, Any]:
    """What of its transformer_options travels with every call: to ComfyUI's own classes as they are.

    Raises:
        NotInTheLoop: the model has patches that act in the host's sampling loop, which does not run.
    """
    model.refuse_what_stays_here()
    options = dict(model.model_options)
    acting = travelling(options.pop(OPTIONS, {}))
    present = [name for name, value in options.items() if value]
    for kind, by_name in (*model.wrappers.items(), *model.callbacks.items()):
        present += [kind] if any(by_name.values()) else []
    present += [name for name in model.object_patches if name not in FOLLOWED]
    if present:
        raise NotInTheLoop(
            f"a node patches the sampling of this MODEL ({', '.join(map(str, present))}), which the "
            "ranks' own loop would ignore"
        )
    if travelling is plain_options:
        return {OPTIONS: acting}
    return with_references(acting, model.model.diffusion_model)


def _check_class(model: RemotePatcher, mask: torch.Tensor | None) -> None:
    """Raise NotInTheLoop where ComfyUI's class of the model does more around a call than the ranks' loop."""
    own = type(model.model)
    changed = {name for name in AROUND_A_CALL if getattr(own, name) is not getattr(BaseModel, name)}
    if mask is None:  # without which these do nothing
        changed.discard("scale_latent_inpaint")
        if "denoise_mask" in inspect.signature(own.process_timestep).parameters:
            changed.discard("process_timestep")
    if changed:
        raise NotInTheLoop(
            f"ComfyUI's {own.__name__} has its own {', '.join(sorted(changed))}, which the ranks' loop does "
            "not know"
        )


def _predicted(model: RemotePatcher, sigmas: torch.Tensor) -> dict[str, Any]:
    """What of `Sample` the model's sampling says, as a node may have changed it.

    Raises:
        NotInTheLoop: it samples in a way the ranks do not.
    """
    sampling = model.get_model_object("model_sampling")
    most = len(sigmas) > 0 and (
        math.isclose(float(sampling.sigma_max), float(sigmas[0]), rel_tol=1e-5)
        or float(sigmas[0]) > float(sampling.sigma_max)
    )
    for prediction, known in PREDICTIONS.items():
        # Compared by function: a class that inherits may change one.
        if all(_function(sampling, name) is getattr(known, name) for name in FORMULAS):
            return {
                "prediction": prediction,
                "timesteps": sampling.timestep(sigmas).float(),
                "sigma_data": float(getattr(sampling, "sigma_data", 1.0)),
                "most": most,
            }
    raise NotInTheLoop(
        f"the ranks' loop knows {', '.join(PREDICTIONS)} prediction, and this MODEL samples in another way"
    )


def _function(sampling: Any, name: str) -> Any:
    return getattr(getattr(sampling, name), "__func__", None)


def _nets(
    model: RemotePatcher, positive: list[Any], negative: list[Any] | None, noise: torch.Tensor
) -> tuple[tuple[AppliedControlNet, ...], ...]:
    """The ControlNets in the ranks of both sides. Where both have the same, it is one tuple."""
    chains = []
    for conditioning in (positive, negative):
        options = conditioning[0][1] if conditioning else {}
        chains.append(options.get("control"))
    if negative and chains[1] is None and positive and positive[0][1].get("control_apply_to_uncond"):
        chains[1] = chains[0]  # as ComfyUI does it after 'Apply ControlNet (OLD)'
    # A stock one is refused with the other conditions.
    ours = [chain for chain in chains if chain is not None and runs_in_ranks(chain)]
    found = {id(chain): nets_of_run(model, chain, noise) for chain in ours}
    return tuple(found.get(id(chain), ()) for chain in chains)


def _conditions(
    model: RemotePatcher,
    conditioning: list[Any],
    name: str,
    noise: torch.Tensor,
    latent: torch.Tensor,
    mask: torch.Tensor | None,
    seed: int,
) -> dict[str, Any]:
    """Keyword arguments of the transformer, one row per picture, as ComfyUI's own model makes them."""
    if len(conditioning) != 1:
        raise NotInTheLoop(f"{name} has {len(conditioning)} conditionings; the ranks' loop takes one")
    for entry, words in SPECIAL_CONDITIONS.items():
        value = conditioning[0][1].get(entry)
        if value is not None and not (entry == "control" and runs_in_ranks(value)):
            raise NotInTheLoop(f"{name} has {words} ({entry}), which the ranks' loop does not know")
    (encoded,) = comfy.samplers.encode_model_conds(
        model.model.extra_conds,
        comfy.sampler_helpers.convert_cond(conditioning),
        noise,
        noise.device,
        name,
        latent_image=latent,
        denoise_mask=mask,
        seed=seed,
    )
    arguments = {
        key: condition.process_cond(batch_size=noise.shape[0], device=noise.device, area=None).cond
        for key, condition in encoded["model_conds"].items()
    }
    if "c_concat" in arguments:
        raise NotInTheLoop("the ranks' loop does not know an inpainting model's extra channels")
    if "c_crossattn" in arguments:
        arguments["context"] = arguments.pop("c_crossattn")
    return arguments
