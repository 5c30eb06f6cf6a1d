"""Handles of ControlNets that the ranks run, and what is said of one that is applied to a conditioning.

A net runs in the ranks of whatever MODEL samples, so no rank is asked before. What a header tells is
checked when the loader runs, the picture when it is applied, and the fit to the model at its first call.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from comfy_xdit.protocol.controlnet_files import ControlNetKind
from comfy_xdit.protocol.description import LatentSpace
from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.parallel import ParallelConfig
from comfy_xdit.protocol.spec import CONTROL_TYPES, ControlNet
from comfy_xdit.ranks.registry import holders, worker_group
from comfy_xdit.remote.hints import Encoder, check_picture, latent_hint, pixel_hint
from comfy_xdit.remote.model import RemoteModel

MAX_STRENGTH = 100.0


@dataclass(eq=False)
class RemoteControlNet:
    """A ControlNet for the ranks. They keep it while this handle lives, and a while longer."""

    spec: ControlNet
    kind: ControlNetKind
    _held: set[ParallelConfig] = field(default_factory=set, repr=False)

    def needed_by(self, remote: RemoteModel) -> None:
        """`remote` is about to be called with it."""
        parallel = worker_group(remote.parallel).parallel
        if parallel not in self._held:
            holders.hold(self, parallel, self.spec, None)
            self._held.add(parallel)

    def refuse_without_vae(self, vae: Any) -> None:
        """Raise InvalidInput where the hint must be encoded and nothing encodes it."""
        if self.kind.takes == "latents" and vae is None:
            raise InvalidInput(
                f"{self.spec.name} takes its hint as the latents of a VAE, and no VAE is connected; "
                "connect the model's VAE to the input `vae`."
            )

    def hint(
        self,
        image: torch.Tensor,
        latent: torch.Tensor,
        space: LatentSpace,
        encode: Encoder | None = None,
        ratio: int = 1,
    ) -> torch.Tensor:
        """What the ranks get of a hint picture where a model draws `latent` of `space`."""
        if self.kind.takes == "pixels":
            return pixel_hint(image, space.whole_pixels(latent.shape))
        return latent_hint(self.spec.name, image, latent, encode, ratio)


@dataclass(frozen=True, eq=False)
class Application:
    """A ControlNet on a conditioning.

    Args:
        image: the hint picture, (B, H, W, 3 or more) in 0..1.
        vae: what encodes it, None where the ControlNet takes pictures.
        start, end: shares of the run between which it acts.
        mode: the control type of a union ControlNet.
    """

    net: RemoteControlNet
    image: torch.Tensor
    vae: Any
    strength: float
    start: float
    end: float
    mode: int | None


def checked_application(
    net: RemoteControlNet, image: Any, strength: float, start: float, end: float, control_type: str, vae: Any
) -> Application:
    """What a node says of a ControlNet.

    Raises:
        InvalidInput: a value that cannot be, or one that this ControlNet has no use for.
    """
    check_picture(image)
    if not abs(strength) <= MAX_STRENGTH:
        raise InvalidInput(f"strength is {strength}; set it to a number of at most {MAX_STRENGTH:g}.")
    if not 0.0 <= start <= end <= 1.0:
        raise InvalidInput(f"start is {start} and end is {end}; set both within 0..1, start first.")
    net.refuse_without_vae(vae)
    if control_type not in CONTROL_TYPES:
        raise InvalidInput(
            f"control_type {control_type!r} is not one of {', '.join(CONTROL_TYPES)}; choose one."
        )
    mode = CONTROL_TYPES[control_type]
    check_mode(net, mode)
    return Application(net, image, vae, strength, start, end, mode)


def check_mode(net: RemoteControlNet, mode: int | None) -> None:
    """Raise InvalidInput for a control type that the ControlNet does not have."""
    if mode is None or 0 <= mode < net.kind.modes:
        return
    if net.kind.modes == 0:
        raise InvalidInput(
            f"{net.spec.name} has no control types, and control type {mode} is chosen; "
            "set control_type to none."
        )
    raise InvalidInput(
        f"{net.spec.name} has the control types 0 to {net.kind.modes - 1}, and {mode} is chosen; choose "
        "one of them."
    )


def mode_of(words: Any) -> int | None:
    """The mode that stock SetUnionControlNetType chose: [number], or nothing."""
    if isinstance(words, (list, tuple)) and len(words) == 1:
        return int(words[0])
    if words:
        raise InvalidInput(
            f"control_type is {words}; a ControlNet in the ranks takes one type: choose one number."
        )
    return None
