"""What the nodes need of what is around them: ComfyUI (comfy_types), or a run without it (headless)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from comfy_xdit.protocol.errors import InvalidInput, NotInTheLoop
from comfy_xdit.protocol.spec import SAMPLERS

if TYPE_CHECKING:  # the nodes import with nothing but the standard library installed
    import torch

    from comfy_xdit.protocol.messages import Progress, Sample
    from comfy_xdit.protocol.spec import LoraFile, ModelSpec
    from comfy_xdit.remote import (
        Application,
        PicturePrompt,
        Remote,
        RemoteControlNet,
        RemoteModel,
        RemoteTextEncoders,
        RemoteVAE,
    )

# What a person can choose, by the folder of ComfyUI's models/ that it lies in.
KINDS = {
    "diffusers": "pipeline",
    "checkpoints": "checkpoint",
    "diffusion_models": "diffusion model",
    "loras": "LoRA",
    "vae": "VAE",
    "controlnet": "ControlNet",
    "ipadapter": "IP-Adapter",
}


# From 0.33 on an empty LATENT says how much smaller it is than the picture: another model's may be resized.
RATIOS = ("downscale_ratio_spacial", "downscale_ratio_temporal")


@dataclass(frozen=True)
class SamplerInputs:
    """What KSampler takes beside the MODEL: its widgets, CONDITIONINGs and LATENT."""

    seed: int
    steps: int
    cfg: float
    sampler_name: str
    scheduler: str
    positive: list[Any]
    negative: list[Any]
    latent_image: dict[str, Any]
    denoise: float = 1.0

    @property
    def guided(self) -> bool:
        """Whether the negative prompt counts: at cfg 1 it has no weight, nor has it in ComfyUI."""
        return not math.isclose(self.cfg, 1.0)

    def check(self) -> None:
        """Raise NotInTheLoop for a sampler that only a stock KSampler has."""
        if self.sampler_name not in SAMPLERS:
            raise NotInTheLoop(
                f"sampler {self.sampler_name!r} does not run in the ranks ({', '.join(SAMPLERS)} do)"
            )


class Surroundings(Protocol):
    """Implemented by comfy_types.surroundings.ComfyUI and headless.surroundings.Headless."""

    def begin(self) -> None:
        """Prepare for a model, before it is loaded; does its work once in a process."""

    def self_check(self) -> tuple[str, ...]:
        """A sentence for everything that the pack relies on and this ComfyUI does otherwise."""

    # ------------------------------------------------------------------ files

    def names(self, kind: str) -> list[str]:
        """Names for a widget, of a kind of KINDS."""

    def path(self, kind: str, name: str) -> Path:
        """The file or folder behind a name of `names(kind)`. Raises InvalidInput if there is none."""

    # ------------------------------------------------------------------ the graph's types

    def spec_of(self, path: Path, weight_dtype: str, checkpoint: bool = False) -> ModelSpec:
        """The diffusion model at `path`, whose class the ranks choose by it.

        Args:
            checkpoint: as a checkpoint loader sees it: by what stands around the model in the file, too.

        Raises:
            InvalidInput: it is no file of a model that is known here.
        """

    def model_of(self, remote: RemoteModel) -> Any:
        """A MODEL whose transformer is `remote`."""

    def clip_of(self, remote: RemoteTextEncoders) -> Any:
        """A CLIP whose encoders are `remote`."""

    def vae_of(self, remote: RemoteVAE) -> Any:
        """A VAE whose work is done by `remote`."""

    def clip_and_vae(self, spec: ModelSpec) -> tuple[Any, Any]:
        """The stock CLIP (or None) and VAE in the file of a diffusion model; none of that model's weights."""

    def controlnet_of(self, net: RemoteControlNet) -> Any:
        """A CONTROL_NET that is `net`."""

    def remote_of(self, thing: Any) -> Remote:
        """The handle behind a MODEL, CLIP or VAE. Raises InvalidInput for any other."""

    def remote_controlnet_of(self, control_net: Any) -> RemoteControlNet:
        """The handle behind a CONTROL_NET. Raises InvalidInput for any other."""

    def with_lora(self, model: Any, file: LoraFile, weights: Iterable[str], strength: float) -> Any:
        """A MODEL with a LoRA that the ranks read, which changes `weights` (native names)."""

    def with_picture(self, model: Any, prompt: PicturePrompt) -> Any:
        """A MODEL that is prompted by one more picture."""

    def with_controlnet(
        self, conditioning: list[Any], control_net: Any, application: Application
    ) -> list[Any]:
        """A CONDITIONING with a CONTROL_NET behind those it has already."""

    def decode_latent(self, vae: Any, latent: torch.Tensor, tile: int) -> torch.Tensor:
        """Unscaled latents to (B, [T,] H, W, 3) in 0..1; `tile` in pixels, 0 is none."""

    # ------------------------------------------------------------------ runs

    def samplers(self) -> list[str]:
        """Names for the sampler widget."""

    def schedulers(self) -> list[str]:
        """Names for the scheduler widget."""

    def sample_request(
        self, model: Any, inputs: SamplerInputs
    ) -> tuple[Sample, Callable[[torch.Tensor], torch.Tensor]]:
        """KSampler's inputs as one message to the ranks.

        Returns:
            The message, and what turns the answer into the samples of a LATENT: (B, C, H, W), unscaled.

        Raises:
            NotInTheLoop: something in the inputs the ranks' loop cannot do, and `drive` can.
        """

    def drive(self, model: Any, inputs: SamplerInputs) -> torch.Tensor:
        """The samples of KSampler's LATENT, whose loop runs in the host and calls the ranks at each step."""

    def progress(self, model: Any, steps: int) -> Callable[[Progress], None]:
        """What shows the ranks' progress on the running node."""

    def interrupted(self) -> bool:
        """Whether the person has asked to stop; leaves the flag as it is."""

    def interruptible(self) -> AbstractContextManager[None]:
        """What the ranks report as Interrupted leaves this block as what ends the run as cancelled."""


_choose: Callable[[], Surroundings] | None = None


def bind(choose: Callable[[], Surroundings]) -> None:
    """Have `choose` say, at each call of a node, what is around it. The root nodes.py does it."""
    global _choose
    _choose = choose


def surroundings() -> Surroundings:
    """What is around the node that runs."""
    if _choose is None:
        raise RuntimeError("the nodes are not bound to their surroundings; load the pack's nodes.py first")
    return _choose()


def check_name(kind: str, name: str | None) -> bool | str:
    """Of a widget's `name`: True, or why it is none of `names(kind)`; None is one that is linked.

    An API prompt can name any file, and a list that lacks it would not say why.
    """
    here = surroundings()
    if name is None or name in here.names(kind):
        return True
    try:
        here.path(kind, name)
    except InvalidInput as why:
        return str(why)
    return f"{name!r} is none of the {KINDS[kind]} files that are listed; press R to read the list again."
