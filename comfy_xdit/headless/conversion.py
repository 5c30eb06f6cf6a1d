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
from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.messages import AppliedControlNet, Sample
from comfy_xdit.protocol.sampling import Sampling
from comfy_xdit.protocol.spec import ModelSpec
from comfy_xdit.remote import Application, RemoteModel, sigmas_of

DEFAULT_GUIDANCE = 3.5  # what ComfyUI gives Flux when no FluxGuidance node is in the graph
FAMILIES = ("sd3", "flux")
REMEDY = "use the stock KSampler"
# ComfyUI's options that say nothing at this value.
_NEUTRAL = {"start_percent": 0.0, "end_percent": 1.0, "strength": 1.0}

Conditioning = Sequence[Sequence[Any]]
Latent = dict[str, Any]
Hints = dict[tuple[int, ...], torch.Tensor]  # by net, picture and VAE


def conditions_of(conditioning: Conditioning, family: str, batch: int) -> dict[str, torch.Tensor]:
    """Keyword arguments of the transformer from a CONDITIONING socket.

    Args:
        conditioning: [[context (1, T, D), {"pooled_output": (1, P), ...}]], one entry.
        family: "sd3" or "flux".
        batch: pictures in the latent; shorter conditioning is repeated, as ComfyUI does.

    Returns:
        sd3: context (B, T, D), y (B, P); flux: also guidance (B,). All float32 on CPU.

    Raises:
        InvalidInput: not a conditioning, several entries, or an option that only ComfyUI's own
            sampling can honour.
    """
    if family not in FAMILIES:
        raise InvalidInput(f"XDiT Sampler does not know the model family {family!r}; {REMEDY}.")
    context, options = _only_entry(conditioning)
    pooled = options.get("pooled_output")
    if not isinstance(pooled, torch.Tensor):
        raise InvalidInput(
            f"the conditioning has no pooled_output, which {family} needs; encode the prompt with the "
            "text encoders of that family (CLIPTextEncode on the CLIP of its pipeline)."
        )
    _refuse_options(options)
    found = {"context": context, "y": pooled}
    if family == "flux":
        found["guidance"] = torch.tensor([float(options.get("guidance", DEFAULT_GUIDANCE))])
    for name, tensor in found.items():
        _refuse_not_finite(tensor, f"conditioning ({name})")
    return {name: _repeated(tensor.float().cpu(), batch) for name, tensor in found.items()}


def samples_of(latent: Latent, channels: int) -> torch.Tensor:
    """The latent (B, C, H, W) of a LATENT socket, unscaled, as it is there.

    An empty latent (all zeros) of another channel count is repeated to `channels`, as ComfyUI does.

    Raises:
        InvalidInput: not a LATENT, not 4-D, of no picture, not finite, or of other channels.
    """
    if not isinstance(latent, dict) or not isinstance(latent.get("samples"), torch.Tensor):
        raise InvalidInput(
            f"latent_image is a {type(latent).__name__} without a `samples` tensor; connect the LATENT "
            "output of a node such as EmptySD3LatentImage or VAEEncode."
        )
    samples = latent["samples"]
    if samples.ndim != 4 or 0 in samples.shape:
        raise InvalidInput(
            f"latent has the shape {tuple(samples.shape)}, the model takes (batch, {channels}, height, "
            "width), each at least 1; use EmptySD3LatentImage or VAEEncode."
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
    """The noise ComfyUI draws for `seed`: on CPU, shaped like `samples` (B, C, H, W).

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
            "it holds one number from 0 up for each."
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


def scaled(samples: torch.Tensor, latent_format: dict[str, float]) -> torch.Tensor:
    """Unscaled latent of a socket to what the transformer sees. ComfyUI leaves an empty one empty."""
    if samples.count_nonzero() == 0:
        return samples
    return (samples - latent_format["shift_factor"]) * latent_format["scale_factor"]


def unscaled(samples: torch.Tensor, latent_format: dict[str, float]) -> torch.Tensor:
    """The transformer's latent to that of a socket: the inverse of `scaled`."""
    return samples / latent_format["scale_factor"] + latent_format["shift_factor"]


def build_sample(
    spec: ModelSpec, info: dict[str, Any], inputs: SamplerInputs
) -> tuple[Sample, Callable[[torch.Tensor], torch.Tensor]]:
    """KSampler's inputs as one message, and what makes its answer a latent for a socket.

    Args:
        info: what the ranks say about the loaded model.

    Raises:
        InvalidInput: a value or a conditioning the ranks cannot honour.
    """
    inputs.check()
    sampling, latent = Sampling.of(info), inputs.latent_image
    samples = samples_of(latent, info["latent_channels"])
    batch, family, latent_format = samples.shape[0], info["family"], info["latent_format"]
    positive, negative = inputs.positive, inputs.negative if inputs.guided else None
    hints: Hints = {}
    request = Sample(
        spec=spec,
        sampler=inputs.sampler_name,
        sigmas=sigmas_of(sampling, inputs.scheduler, inputs.steps, inputs.denoise),
        latent=scaled(samples.float().cpu(), latent_format),
        noise=noise_of(samples, inputs.seed, latent.get("batch_index")).float(),
        cfg=float(inputs.cfg),
        positive=conditions_of(positive, family, batch),
        negative=None if negative is None else conditions_of(negative, family, batch),
        multiplier=sampling.multiplier,
        mask=mask_of(latent, samples),
        positive_nets=nets_of(control_of(positive), samples, sampling, hints),
        negative_nets=() if negative is None else nets_of(control_of(negative), samples, sampling, hints),
    )
    return request, lambda answer: unscaled(answer, latent_format)


def control_of(conditioning: Conditioning) -> tuple[Application, ...]:
    """What XDiTControlNetApply put into a conditioning, of one entry, in the order it was applied."""
    return _only_entry(conditioning)[1].get("control", ())


def hold_nets(remote: RemoteModel, *conditionings: Conditioning) -> None:
    """Have the ranks keep the ControlNets of conditionings for as long as somebody holds them."""
    for application in (one for conditioning in conditionings for one in control_of(conditioning)):
        application.net.needed_by(remote)


def nets_of(
    applications: tuple[Application, ...], latent: torch.Tensor, sampling: Sampling, hints: Hints
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
            hint = one.net.hint(one.image, latent, encode, ratio)
            # One for all pictures, or repeated and cut as stock does.
            hints[key] = hint if len(hint) == 1 else _repeated(hint, latent.shape[0])
        sigmas = sampling.sigma_at(one.start), sampling.sigma_at(one.end)
        found.append(AppliedControlNet(one.net.spec, hints[key], float(one.strength), one.mode, sigmas))
    return tuple(found)


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


def _refuse_options(options: dict[str, Any]) -> None:
    known = ("pooled_output", "guidance")
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
