"""MODEL: the twin in a patcher, with its innermost call done by the ranks."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import comfy.model_management
import folder_paths
import torch

from comfy_xdit.comfy_types.interruption import interrupted, interruptible, raise_if_interrupted
from comfy_xdit.comfy_types.model.controlnet import NETS
from comfy_xdit.comfy_types.model.described import described_twin
from comfy_xdit.comfy_types.model.exact_calls import answer_for, arguments
from comfy_xdit.comfy_types.model.options import PICTURES, rank_options
from comfy_xdit.comfy_types.model.original import ORIGINAL, Original
from comfy_xdit.comfy_types.model.patcher import HANDLE, RemotePatcher
from comfy_xdit.comfy_types.model.prompts import pair_prompts
from comfy_xdit.comfy_types.model.residuals import residuals
from comfy_xdit.comfy_types.model.rope import with_references
from comfy_xdit.comfy_types.model.twin import build_twin
from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.messages import LENGTHS, AppliedControlNet, ImagePrompt
from comfy_xdit.protocol.spec import LoraFile
from comfy_xdit.remote import PicturePrompt, Remote, RemoteModel, at_sigmas, negative_rows


def model_of(remote: RemoteModel) -> RemotePatcher:
    """A MODEL for every stock node, whose transformer is `remote`.

    Raises:
        InvalidInput: this ComfyUI does not know the model's family.
    """
    described = remote.described()
    dtypes = _dtype(described.dtype), _dtype(described.manual_cast)
    if described.twin is None:
        twin = build_twin(remote.spec.path, *dtypes, remote.spec.checkpoint)
    else:
        twin = described_twin(remote.spec.path, described, *dtypes)
    setattr(twin, HANDLE, remote)
    if described.comfyui:
        answer_for(remote, twin, described)
    else:
        pair_prompts(twin)
        _send_calls_to(remote, twin)
    setattr(twin, ORIGINAL, Original(twin.diffusion_model, folder_paths.get_folder_paths("custom_nodes")))
    management = comfy.model_management
    return RemotePatcher(twin, management.get_torch_device(), management.unet_offload_device())


def remote_of(thing: Any) -> Remote:
    """The handle behind a MODEL, CLIP or VAE.

    Raises:
        InvalidInput: it is a stock one.
    """
    for owner, kind in (("model", "MODEL"), ("cond_stage_model", "CLIP"), ("first_stage_model", "VAE")):
        if hasattr(thing, owner):
            remote = getattr(thing, HANDLE, None) or getattr(getattr(thing, owner), HANDLE, None)
            if remote is not None:
                return remote
            raise InvalidInput(
                f"this node needs a {kind} from 'xDiT Load Pipeline' or another xDiT loader; "
                f"this one is a stock {kind}. Use the stock node with it, or load it with an xDiT loader."
            )
    raise InvalidInput(f"{type(thing).__name__} is neither a MODEL, a CLIP nor a VAE; connect one of them.")


def with_lora(model: RemotePatcher, file: LoraFile, weights: Iterable[str], strength: float) -> RemotePatcher:
    """A MODEL with a LoRA file of the ranks, which changes `weights` (native names)."""
    return model.with_lora(file, weights, strength)


def with_picture(model: RemotePatcher, prompt: PicturePrompt) -> RemotePatcher:
    """A MODEL that is prompted by one more picture."""
    other = model.clone()
    options = other.model_options["transformer_options"]
    options[PICTURES] = (*options.get(PICTURES, ()), prompt)
    return other


def pictures_of(model: RemotePatcher) -> tuple[ImagePrompt, ...]:
    """The pictures of a MODEL, with the noise levels at which they count."""
    prompts = model.model_options["transformer_options"].get(PICTURES, ())
    return at_sigmas(prompts, model.get_model_object("model_sampling").percent_to_sigma)


def _dtype(name: str | None) -> torch.dtype | None:
    return name and getattr(torch, name)


def _send_calls_to(remote: RemoteModel, twin: Any) -> None:
    """Replace the innermost method of the transformer, so that ComfyUI's wrappers around it stay."""
    transformer = twin.diffusion_model
    name = "_forward" if hasattr(transformer, "_forward") else "forward"
    signature = inspect.signature(getattr(transformer, name))
    owner = weakref.ref(twin)  # a strong one would be a cycle, and the twin outlive its last MODEL

    def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
        twin = owner()
        getattr(twin, ORIGINAL).refuse_changes(twin)
        given = _arguments(signature, args, kwargs)
        call = {name: value for name, value in given._asdict().items() if name != "options"}
        call["conditions"] = with_references(given.conditions, twin.diffusion_model)
        call["image_prompts"], call["negative"] = _pictures(given, twin)
        raise_if_interrupted()
        with interruptible():
            out = remote.denoise(**call, interrupted=interrupted)
        return out.to(device=given.x.device, dtype=given.x.dtype)

    # An instance attribute: nn.Module.__setattr__ would do the same, more slowly.
    object.__setattr__(transformer, name, forward)


class _Arguments(NamedTuple):
    """What one call of the transformer says."""

    x: torch.Tensor
    timestep: torch.Tensor
    conditions: dict[str, Any]
    control: dict[str, list[torch.Tensor | None]] | None
    nets: tuple[AppliedControlNet, ...]
    options: Mapping[str, Any]  # transformer_options, whole


def _arguments(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Arguments:
    """The arguments of one call, under the names the transformer's class gives them.

    Raises:
        InvalidInput: something in the call cannot reach the ranks.
    """
    x, timestep, given = arguments(signature, args, kwargs)
    all_options = given.pop("transformer_options", None) or {}
    nets = tuple(all_options.get(NETS, ()))
    options = rank_options({name: value for name, value in all_options.items() if name != NETS})
    control = residuals(given.pop("control", None))
    if not isinstance(x, torch.Tensor):
        raise InvalidInput(
            f"{len(x)} latents at once are for a class of ComfyUI's own, and this model has another. "
            "Use the stock loader."
        )
    conditions = options | {name: value for name, value in given.items() if value is not None}
    if control is not None and LENGTHS in conditions:
        raise InvalidInput(
            "a ControlNet was given prompts of different length in one batch, which it cannot tell from "
            "padding. Apply the ControlNet to positive and negative with 'Apply ControlNet' (advanced)."
        )
    return _Arguments(x, timestep, conditions, control, nets, all_options)


def _pictures(given: _Arguments, twin: Any) -> tuple[tuple[ImagePrompt, ...], list[bool]]:
    """The pictures that count in this call, and which rows do not see them."""
    pictures = given.options.get(PICTURES)
    if not pictures:
        return (), []
    sampling, sigmas = twin.model_sampling, given.options.get("sigmas")  # of the run: a node may change it
    sigma = float((sampling.sigma(given.timestep) if sigmas is None else sigmas).flatten()[0])
    prompts = at_sigmas(pictures, sampling.percent_to_sigma)
    negative = negative_rows(given.options.get("cond_or_uncond"), len(given.x))
    return tuple(prompt for prompt in prompts if prompt.acts(sigma)), negative
