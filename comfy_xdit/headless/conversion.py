"""ComfyUI's CONDITIONING and LATENT to and from the plain arguments of `messages.Sample`.

What cannot be said to the ranks is refused by name: a conditioning option that was dropped in
silence would draw another picture than the graph says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from comfy_xdit.nodes.surroundings import SamplerInputs
from comfy_xdit.protocol.description import LatentSpace, ModelDescription, PromptPart
from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.messages import AppliedControlNet, Sample
from comfy_xdit.protocol.spec import ModelSpec
from comfy_xdit.remote import Application, RemoteModel, sigmas_of

REMEDY = "use the stock KSampler"
# ComfyUI's options that say nothing at this value.
_NEUTRAL = {"start_percent": 0.0, "end_percent": 1.0, "strength": 1.0}

Conditioning = Sequence[Sequence[Any]]
Latent = dict[str, Any]
Hints = dict[tuple[int, ...], torch.Tensor]  # by net, picture and VAE


def conditions_of(
    conditioning: Conditioning, described: ModelDescription, batch: int
) -> dict[str, torch.Tensor]:
    """Keyword arguments of the transformer from a CONDITIONING socket.

    Args:
        conditioning: [[context (1, T, D), {"pooled_output": (1, P), ...}]], one entry.
        described: the model, which says what it takes of it.
        batch: pictures in the latent; shorter conditioning is repeated, as ComfyUI does.

    Returns:
        By argument: context (B, T, D), and what of y (B, P) and guidance (B,) the model takes. All float32
        on CPU.

    Raises:
        InvalidInput: not a conditioning, several entries, or an option that only ComfyUI's own
            sampling can honour.
    """
    context, options = _only_entry(conditioning)
    parts = [part for part in described.prompt if not (part.optional and options.get(part.option) is None)]
    found = {part.name: _part(part, context, options, described.family) for part in parts}
    _refuse_options(options, {part.option for part in parts})
    for name, tensor in found.items():
        _refuse_not_finite(tensor, f"conditioning ({name})")
    return {name: _repeated(tensor.float().cpu(), batch) for name, tensor in found.items()}


def samples_of(latent: Latent, space: LatentSpace) -> torch.Tensor:
    """The latent of a LATENT socket, unscaled, as it is there: (B, C, H, W), or (B, C, T, H, W) of videos.

    An empty latent (all zeros) of another channel count is repeated to the model's, and a picture becomes a
    video of one frame, as ComfyUI does.

    Raises:
        InvalidInput: not a LATENT, of other dimensions, of no picture, not finite, or of other channels.
    """
    if not isinstance(latent, dict) or not isinstance(latent.get("samples"), torch.Tensor):
        raise InvalidInput(
            f"latent_image is a {type(latent).__name__} without a `samples` tensor; connect the LATENT "
            "output of a node such as EmptySD3LatentImage or VAEEncode."
        )
    samples, channels = latent["samples"], space.channels
    if space.dimensions == 3 and samples.ndim == 4:
        samples = samples.unsqueeze(2)
    if samples.ndim != 2 + space.dimensions or 0 in samples.shape:
        raise InvalidInput(
            f"latent has the shape {tuple(samples.shape)}, the model takes {space.shape}, each at least 1; "
            "use EmptySD3LatentImage or VAEEncode."
        )
    _refuse_not_finite(samples, "latent")
    if samples.shape[1] == channels:
        return samples
    if samples.count_nonzero() > 0:
        raise InvalidInput(
            f"latent has {samples.shape[1]} channels, the model takes {channels}; use EmptySD3LatentImage, "
            "or encode the picture with the VAE of this model."
        )
    return samples.new_zeros(samples.shape[0], channels, *samples.shape[2:])


def noise_of(samples: torch.Tensor, seed: int, batch_index: Sequence[int] | None = None) -> torch.Tensor:
    """The noise ComfyUI draws for `seed`: on CPU, shaped like `samples`.

    Args:
        batch_index: the place of each picture in the batch it came from, so that it gets the noise
            it would have had there.
    """
    generator = torch.Generator().manual_seed(seed)
    if batch_index is None:
        return torch.randn(samples.shape, generator=generator, dtype=samples.dtype)
    if len(batch_index) != samples.shape[0] or min(batch_index) < 0:
        raise InvalidInput(
            f"batch_index is {list(batch_index)} for {samples.shape[0]} pictures; "
            "it holds one number from 0 up for each; make the latent anew with an empty latent node."
        )
    drawn = [
        torch.randn((1, *samples.shape[1:]), generator=generator, dtype=samples.dtype)
        for _ in range(max(batch_index) + 1)
    ]
    return torch.cat([drawn[index] for index in batch_index])


def mask_of(latent: Latent, samples: torch.Tensor) -> torch.Tensor | None:
    """The latent's noise mask resized to (B, 1, H, W) of `samples`; None when it has none.

    Raises:
        InvalidInput: the mask is not a tensor of pictures, or not finite.
    """
    mask = latent.get("noise_mask")
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor) or mask.ndim < 2 or 0 in mask.shape:
        raise InvalidInput(
            "noise_mask of the latent is not a MASK (batch, height, width); use Set Latent Noise Mask."
        )
    _refuse_not_finite(mask, "noise_mask")
    mask = mask.reshape(-1, 1, *mask.shape[-2:]).float().cpu()
    return _repeated(F.interpolate(mask, size=samples.shape[2:], mode="bilinear"), samples.shape[0])


def build_sample(
    spec: ModelSpec, described: ModelDescription, inputs: SamplerInputs
) -> tuple[Sample, Callable[[torch.Tensor], torch.Tensor]]:
    """KSampler's inputs as one message, and what makes its answer a latent for a socket.

    Args:
        described: the model, of a class of diffusers'.

    Raises:
        InvalidInput: a value or a conditioning the ranks cannot honour.
    """
    inputs.check()
    sampling, space, latent = described.sampling, described.latent, inputs.latent_image
    samples = samples_of(latent, space)
    batch, is_empty = samples.shape[0], samples.count_nonzero() == 0
    positive, negative = inputs.positive, inputs.negative if inputs.guided else None
    hints: Hints = {}
    sigmas = sigmas_of(sampling, inputs.scheduler, inputs.steps, inputs.denoise)
    request = Sample(
        spec=spec,
        sampler=inputs.sampler_name,
        sigmas=sigmas,
        # ComfyUI leaves an empty one empty.
        latent=samples.float().cpu() if is_empty else space.scaled(samples.float().cpu()),
        noise=noise_of(samples, inputs.seed, latent.get("batch_index")).float(),
        cfg=float(inputs.cfg),
        positive=conditions_of(positive, described, batch),
        negative=None if negative is None else conditions_of(negative, described, batch),
        timesteps=sampling.timesteps(sigmas),
        mask=mask_of(latent, samples),
        positive_nets=nets_of(control_of(positive), samples, described, hints),
        negative_nets=() if negative is None else nets_of(control_of(negative), samples, described, hints),
        prediction=sampling.prediction,
        most=len(sigmas) > 0 and sampling.begins_at_most(sigmas),
    )
    return request, space.unscaled


def control_of(conditioning: Conditioning) -> tuple[Application, ...]:
    """What XDiTControlNetApply put into a conditioning, of one entry, in the order it was applied."""
    return _only_entry(conditioning)[1].get("control", ())


def hold_nets(remote: RemoteModel, *conditionings: Conditioning) -> None:
    """Have the ranks keep the ControlNets of conditionings for as long as somebody holds them."""
    for application in (one for conditioning in conditionings for one in control_of(conditioning)):
        application.net.needed_by(remote)


def nets_of(
    applications: tuple[Application, ...], latent: torch.Tensor, described: ModelDescription, hints: Hints
) -> tuple[AppliedControlNet, ...]:
    """The ControlNets of a conditioning for a loop in the ranks that draws `latent` (B, C, H, W).

    Args:
        hints: of pictures that were encoded already; filled.
    """
    found = []
    for one in applications:
        key = (id(one.net), id(one.image), id(one.vae))
        if key not in hints:
            encode, ratio = (one.vae.encode, one.vae.ratio) if one.vae is not None else (None, 1)
            hint = one.net.hint(one.image, latent, described.latent, encode, ratio)
            # One for all pictures, or repeated and cut as stock does.
            hints[key] = hint if len(hint) == 1 else _repeated(hint, latent.shape[0])
        sigmas = tuple(described.sampling.sigma_at(share) for share in (one.start, one.end))
        found.append(AppliedControlNet(one.net.spec, hints[key], float(one.strength), one.mode, sigmas))
    return tuple(found)


def _part(part: PromptPart, context: torch.Tensor, options: dict[str, Any], family: str) -> torch.Tensor:
    """One argument of the transformer."""
    value = options.get(part.option) if part.option else context
    if part.default is not None:
        return torch.tensor([float(part.default if value is None else value)])
    if not isinstance(value, torch.Tensor):
        raise InvalidInput(
            f"the conditioning has no {part.option}, which {family} needs; encode the prompt with the "
            "text encoders of that family (CLIPTextEncode on the CLIP of its pipeline)."
        )
    return value


def _only_entry(conditioning: Conditioning) -> tuple[torch.Tensor, dict[str, Any]]:
    if not isinstance(conditioning, (list, tuple)) or not conditioning:
        raise InvalidInput(
            f"conditioning is {type(conditioning).__name__} without an entry; connect the CONDITIONING "
            "output of a node such as CLIPTextEncode."
        )
    if len(conditioning) > 1:
        raise InvalidInput(
            f"the conditioning has {len(conditioning)} entries (combined prompts), which the ranks "
            f"cannot weigh; {REMEDY}."
        )
    entry = conditioning[0]
    if not (len(entry) == 2 and isinstance(entry[0], torch.Tensor) and isinstance(entry[1], dict)):
        raise InvalidInput("the conditioning is not [[tensor, options]]; connect a CONDITIONING output.")
    if entry[0].ndim != 3:
        raise InvalidInput(
            f"the conditioning has the shape {tuple(entry[0].shape)}, not (batch, tokens, width); "
            "encode the prompt with the text encoders of this model."
        )
    return entry[0], entry[1]


def _refuse_options(options: dict[str, Any], taken: set[str]) -> None:
    known = {"pooled_output", "guidance"} | taken
    refused = [
        name
        for name, value in options.items()
        if name not in known and value is not None and not _says_nothing(name, value)
    ]
    if refused:
        raise InvalidInput(
            f"the conditioning carries {', '.join(sorted(refused))}, which XDiT Sampler does not honour; "
            f"{REMEDY}, which does."
        )


def _says_nothing(name: str, value: Any) -> bool:
    if name == "control":  # ControlNets of the ranks travel beside the conditioning
        return isinstance(value, tuple) and all(isinstance(one, Application) for one in value)
    return name in _NEUTRAL and isinstance(value, (int, float)) and value == _NEUTRAL[name]


def _refuse_not_finite(tensor: torch.Tensor, name: str) -> None:
    if not tensor.isfinite().all():
        raise InvalidInput(
            f"{name} holds values that are infinite or not a number; look at the node that made it."
        )


def _repeated(tensor: torch.Tensor, batch: int) -> torch.Tensor:
    """`tensor` repeated or cut along its first axis to `batch`."""
    times = math.ceil(batch / tensor.shape[0])
    return tensor.repeat(times, *[1] * (tensor.ndim - 1))[:batch].contiguous()
