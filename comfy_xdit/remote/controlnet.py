"""XDiTControlNetLoader and XDiTControlNetApply: handles of ControlNets that the ranks run, and their hints.

The net runs in the ranks of whatever MODEL samples, so no rank is asked before. What a header tells is
checked when the loader runs, the picture when it is applied, and the fit to the model at its first call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch

from comfy_xdit.protocol.controlnet_files import ControlNetKind, kind_at
from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.messages import AppliedControlNet
from comfy_xdit.protocol.parallel import ParallelConfig
from comfy_xdit.protocol.spec import CONTROL_TYPES, ControlNet
from comfy_xdit.ranks.group import holders, worker_group
from comfy_xdit.remote.model import RemoteModel
from comfy_xdit.remote.schedulers import Sampling

PIXELS_PER_LATENT = 8
PATCH = 2
MAX_STRENGTH = 100.0

Encoder = Callable[[torch.Tensor], torch.Tensor]  # (B, H, W, 3) in 0..1 to unscaled latents


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


def open_control_net(name: str, here: ModuleType) -> Any:
    """The CONTROL_NET over one file or folder.

    Args:
        here: the surroundings, comfy_xdit.comfy_types or comfy_xdit.headless.surroundings.

    Raises:
        InvalidInput: nothing is there, or it is no ControlNet for the ranks.
    """
    path = here.control_net_path(name)
    spec = ControlNet.of(path)
    return here.control_net_of(RemoteControlNet(spec, kind_at(path, spec.name)))


def checked_application(
    net: RemoteControlNet, image: Any, strength: float, start: float, end: float, control_type: str, vae: Any
) -> int | None:
    """The mode of a union ControlNet, None of any other.

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
        raise InvalidInput(f"control_type {control_type!r} is not one of {', '.join(CONTROL_TYPES)}.")
    mode = CONTROL_TYPES[control_type]
    check_mode(net, mode)
    return mode


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


def check_picture(image: Any) -> None:
    """Raise InvalidInput unless it is an IMAGE: (B, H, W, 3 or more), finite, not empty."""
    if not isinstance(image, torch.Tensor) or image.ndim != 4 or image.shape[-1] < 3 or 0 in image.shape:
        shape = tuple(image.shape) if isinstance(image, torch.Tensor) else type(image).__name__
        raise InvalidInput(
            f"the hint picture is {shape}; a ControlNet takes (pictures, height, width, 3), each at least 1: "
            "connect an IMAGE output."
        )
    if not torch.isfinite(image).all():
        raise InvalidInput(
            "the hint picture holds values that are not finite (NaN or infinity); check the node it is from."
        )


def hint_of(
    net: RemoteControlNet, image: torch.Tensor, latent: torch.Tensor, encode: Encoder | None, ratio: int
) -> torch.Tensor:
    """The hint as `AppliedControlNet` has it: scaled to the picture that is drawn, and encoded if need be.

    Args:
        image: (B, H, W, 3 or more) in 0..1.
        latent: what is drawn, (B, C, H, W).
        encode: the VAE's; None where the ControlNet takes pictures.
        ratio: pixels per latent pixel of that VAE.

    Raises:
        InvalidInput: the VAE gives something else than latents of this model.
    """
    height, width = latent.shape[-2:]
    picture = image[..., :3].movedim(-1, 1).float()
    if net.kind.takes == "pixels":
        down, across = (-(-side // PATCH) * PATCH * PIXELS_PER_LATENT for side in (height, width))
        return scaled(picture, down, across).contiguous()
    hint = encode(scaled(picture, height * ratio, width * ratio).movedim(1, -1))
    hint = hint.float()
    if hint.ndim != 4 or hint.shape[1:] != latent.shape[1:]:
        raise InvalidInput(
            f"the VAE makes latents of shape {tuple(hint.shape)} of the hint picture, the model draws "
            f"{tuple(latent.shape)}; connect the VAE of this model to the node that applies the ControlNet."
        )
    if not torch.isfinite(hint).all():
        raise InvalidInput(
            f"the VAE makes values that are not finite of the hint picture for {net.spec.name}; use a VAE in "
            "fp32 or bf16."
        )
    return hint.contiguous()


def scaled(picture: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(B, C, H, W) cut around its centre to the aspect asked for, then resized to the nearest pixels.

    Raises:
        InvalidInput: the picture is so narrow that nothing is left.
    """
    rows, columns = picture.shape[-2:]
    down = across = 0
    if columns * height > width * rows:
        across = round((columns - columns * ((width / height) / (columns / rows))) / 2)
    elif columns * height < width * rows:
        down = round((rows - rows * ((columns / rows) / (width / height))) / 2)
    part = picture[..., down : rows - down, across : columns - across]
    if 0 in part.shape:
        raise InvalidInput(
            f"the hint picture is {columns} x {rows} pixels, of which nothing is left at the aspect of "
            f"{width} x {height}; use a picture closer to that shape."
        )
    return torch.nn.functional.interpolate(part, (height, width), mode="nearest-exact")


@dataclass(frozen=True, eq=False)
class Application:
    """A ControlNet on a conditioning without ComfyUI, behind `before`. `image` is (B, H, W, 3) in 0..1."""

    net: RemoteControlNet
    image: torch.Tensor
    vae: Any
    strength: float
    start: float
    end: float
    mode: int | None
    before: Application | None = None

    @property
    def chain(self) -> tuple[Application, ...]:
        """All of them, in the order they were applied."""
        return (*(self.before.chain if self.before is not None else ()), self)


Hints = dict[tuple[int, ...], torch.Tensor]


def nets_of(
    application: Application | None, latent: torch.Tensor, sampling: Sampling, hints: Hints
) -> tuple[AppliedControlNet, ...]:
    """The ControlNets of a conditioning for a loop in the ranks that draws `latent` (B, C, H, W).

    Args:
        hints: of pictures that were encoded already; filled.
    """
    found = []
    for one in application.chain if application is not None else ():
        key = (id(one.net), id(one.image), id(one.vae))
        if key not in hints:
            encode, ratio = (one.vae.encode, one.vae.ratio) if one.vae is not None else (None, 1)
            hint = hint_of(one.net, one.image, latent, encode, ratio)
            times = -(
                -latent.shape[0] // hint.shape[0]
            )  # one for all pictures, or repeated and cut as stock does
            hints[key] = hint if len(hint) == 1 else hint.repeat(times, 1, 1, 1)[: latent.shape[0]]
        sigmas = sampling.sigma_at(one.start), sampling.sigma_at(one.end)
        found.append(AppliedControlNet(one.net.spec, hints[key], float(one.strength), one.mode, sigmas))
    return tuple(found)


def mode_of(words: Any) -> int | None:
    """The mode that stock SetUnionControlNetType chose: [number], or nothing."""
    if isinstance(words, (list, tuple)) and len(words) == 1:
        return int(words[0])
    if words:
        raise InvalidInput(f"control_type is {words}; a ControlNet in the ranks takes one of its types.")
    return None


# ---------------------------------------------------------------------- without ComfyUI


def control_net_of(net: RemoteControlNet) -> RemoteControlNet:
    """CONTROL_NET: the handle itself."""
    return net


def apply_control_net(
    conditioning: list[Any],
    control_net: Any,
    image: torch.Tensor,
    strength: float,
    start: float,
    end: float,
    control_type: str = "none",
    vae: Any = None,
) -> list[Any]:
    """XDiTControlNetApply's work: `conditioning` with the ControlNet behind those it has already.

    Raises:
        InvalidInput: no ControlNet, or a value that cannot be.
    """
    if not isinstance(control_net, RemoteControlNet):
        raise InvalidInput(
            f"{type(control_net).__name__} is no CONTROL_NET; connect 'xDiT ControlNet Loader'."
        )
    mode = checked_application(control_net, image, strength, start, end, control_type, vae)
    if strength == 0:
        return conditioning
    return [
        [
            context,
            {
                **options,
                "control": Application(
                    control_net, image, vae, strength, start, end, mode, options.get("control")
                ),
            },
        ]
        for context, options in conditioning
    ]
