"""XDiTIPAdapterLoader and XDiTIPAdapterApply: a MODEL that is prompted by pictures.

The MODEL names the adapter's file, which the ranks read, and carries the encoded picture, a weight and
the part of the run in which it counts. The negative prompt sees zeros instead of the picture.
docs/decisions/012-ip-adapter.md says why this is an addition to the MODEL.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from comfy_xdit.protocol.errors import Interrupted, InvalidInput
from comfy_xdit.protocol.messages import ImagePrompt
from comfy_xdit.protocol.parallel import ParallelConfig
from comfy_xdit.protocol.spec import IPAdapterFile

# What ComfyUI's CLIP Vision Encode gives and adapters take.
OUTPUTS = ("image_embeds", "penultimate_hidden_states")


@dataclass(frozen=True)
class PicturePrompt:
    """An encoded picture on a MODEL. `start` and `end` are shares of the run, as ComfyUI counts them."""

    file: IPAdapterFile
    embeds: torch.Tensor
    weight: float
    start: float = 0.0
    end: float = 1.0

    def at(self, sigma_of: Callable[[float], float]) -> ImagePrompt:
        """The same with noise levels, where `sigma_of` is the model's percent_to_sigma."""
        return ImagePrompt(
            self.file, self.embeds, self.weight, *(float(sigma_of(p)) for p in (self.start, self.end))
        )


def at_sigmas(
    prompts: Sequence[PicturePrompt], sigma_of: Callable[[float], float]
) -> tuple[ImagePrompt, ...]:
    """All of them with noise levels."""
    return tuple(prompt.at(sigma_of) for prompt in prompts)


def negative_rows(indices: Sequence[int] | None, rows: int) -> list[bool]:
    """Which rows of a call are of the negative prompt.

    Args:
        indices: ComfyUI's `cond_or_uncond`: 0 is the positive and 1 the negative prompt, each of them for
            an equal part of the rows.

    Raises:
        InvalidInput: they are not told, or a guider has further prompts, of which nobody says whether they
            see the picture.
    """
    if not indices or rows % len(indices):
        raise InvalidInput(
            f"a node calls the transformer with {rows} rows and does not say which of them are of the "
            f"negative prompt (cond_or_uncond is {indices}), which an IP-Adapter has to know. Remove that "
            "node, or 'xDiT IP-Adapter Apply'."
        )
    if any(index > 1 for index in indices):
        raise InvalidInput(
            f"the guider uses {max(indices) + 1} prompts, and an IP-Adapter knows a positive and a negative "
            "one only; use CFGGuider, BasicGuider or KSampler, or remove the 'xDiT IP-Adapter Apply' node."
        )
    return [index == 1 for index in indices for _ in range(rows // len(indices))]


def check_files(prompts: Sequence[ImagePrompt]) -> None:
    """Raise InvalidInput where a file has changed: asked here, before any rank has begun."""
    for file in {prompt.file for prompt in prompts}:
        file.check()


def refuse_stages(parallel: ParallelConfig) -> None:
    """Raise InvalidInput where the ranks hold the model in stages."""
    if parallel.pipefusion_degree > 1:
        raise InvalidInput(
            "an IP-Adapter adds to the attention over all image tokens of one step, and under PipeFusion "
            f"(pipefusion_degree {parallel.pipefusion_degree}) patches of several steps are on their way at "
            "once; set pipefusion_degree to 1, and ulysses_degree instead."
        )


def load_ip_adapter(name: str, here: ModuleType) -> IPAdapterFile:
    """The file of that name; it is read when it is applied to a MODEL, which says what it has to be."""
    return IPAdapterFile.of(here.ip_adapter_path(name))


def ip_adapter_stamp(name: str, here: ModuleType) -> tuple[int, int]:
    """Size and modification time of the file."""
    return load_ip_adapter(name, here).stamp


def apply_ip_adapter(
    model: Any,
    ip_adapter: IPAdapterFile,
    clip_vision_output: Any,
    weight: float,
    start_percent: float,
    end_percent: float,
    here: ModuleType,
) -> Any:
    """The MODEL with a picture, after those it has already. `model` stays as it is.

    Args:
        clip_vision_output: what ComfyUI's CLIP Vision Encode gives.
        here: the surroundings, comfy_xdit.comfy_types or comfy_xdit.headless.surroundings.

    Raises:
        InvalidInput: `model` is a stock one, or the file, the picture or the range does not fit.
    """
    remote = here.remote_of(model)
    if not isinstance(ip_adapter, IPAdapterFile):
        raise InvalidInput(
            f"ip_adapter is a {type(ip_adapter).__name__}; connect the output of 'xDiT Load IP-Adapter'."
        )
    if not start_percent < end_percent:
        raise InvalidInput(
            f"start_percent {start_percent} is not before end_percent {end_percent}; make it smaller."
        )
    if not math.isfinite(weight):
        raise InvalidInput(f"weight is {weight}; set a finite number.")
    if weight == 0:  # as a LoRA at strength 0: the file is not even read
        return model
    found = {name: getattr(clip_vision_output, name, None) for name in OUTPUTS}
    encoded = {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}
    here.begin()
    try:
        shapes = {name: tuple(tensor.shape) for name, tensor in encoded.items()}
        told = remote.check_ip_adapter(ip_adapter, shapes, interrupted=here.interrupted)
    except Interrupted:
        here.raise_if_interrupted()
        raise
    embeds = encoded[told["embeds"]].detach().float().cpu()
    if not embeds.isfinite().all():
        raise InvalidInput(
            f"{told['embeds']} of the encoded picture holds values that are not finite (NaN or infinity); "
            "look at the node that made it."
        )
    prompt = PicturePrompt(ip_adapter, embeds, float(weight), float(start_percent), float(end_percent))
    return here.with_picture(model, prompt)
