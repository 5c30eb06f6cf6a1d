"""What the ranks say of a diffusion transformer. Host, planner, samplers and pages go by it, and by no name.

It crosses the bridge, and is remembered, as a plain dict.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.sampling import Sampling


@dataclass(frozen=True)
class LatentSpace:
    """The latents that a model draws. The transformer gets (latent - mean) * scale / std.

    Args:
        channels: of a latent.
        dimensions: 2 for pictures (B, C, H, W), 3 for videos (B, C, T, H, W), 1 for sound (B, C, T).
        compression: pixels per element along a side of the picture; None where only ComfyUI knows it.
        frames: of a video per element in time.
        patch: elements of a token along each dimension; empty where only ComfyUI's class knows it.
        scale: a factor.
        mean, std: of every channel, or one for all; empty is 0 and 1.
    """

    channels: int
    dimensions: int = 2
    compression: int | None = 8
    frames: int = 1
    patch: tuple[int, ...] = (2, 2)
    scale: float = 1.0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    @property
    def shape(self) -> str:
        """The shape of a latent in words."""
        sides = {1: "length", 2: "height, width", 3: "frames, height, width"}[self.dimensions]
        return f"(batch, {self.channels}, {sides})"

    def fits(self, latent: torch.Tensor) -> bool:
        """Whether `latent` has the channels and dimensions."""
        return latent.ndim == 2 + self.dimensions and latent.shape[1] == self.channels

    def tokens(self, shape: Sequence[int]) -> int:
        """How many tokens a latent of this shape has; a patch that is not full counts."""
        sizes = shape[-self.dimensions :]
        return math.prod(-(-size // part) for size, part in zip(sizes, self.patch, strict=True))

    def whole_pixels(self, shape: Sequence[int]) -> tuple[int, int]:
        """Height and width in pixels of a latent of this shape, in whole tokens."""
        sides = zip(shape[-2:], self.patch[-2:], strict=True)
        height, width = (-(-size // part) * part * self.compression for size, part in sides)
        return height, width

    def scaled(self, latent: torch.Tensor) -> torch.Tensor:
        """What the transformer gets of a latent as a VAE makes it."""
        mean, std = self._statistics(latent)
        latent = (latent if mean is None else latent - mean) * self.scale
        return latent if std is None else latent / std

    def unscaled(self, latent: torch.Tensor) -> torch.Tensor:
        """The inverse of `scaled`."""
        mean, std = self._statistics(latent)
        latent = (latent if std is None else latent * std) / self.scale
        return latent if mean is None else latent + mean

    def _statistics(self, latent: torch.Tensor) -> list[torch.Tensor | None]:
        sides = (1,) * self.dimensions
        return [torch.tensor(s).to(latent).view(1, -1, *sides) if s else None for s in (self.mean, self.std)]


@dataclass(frozen=True)
class PromptPart:
    """An argument of the transformer that a CONDITIONING gives.

    Args:
        name: of the argument, as ComfyUI calls it.
        option: the entry of the conditioning's options that holds it; "" is its first tensor.
        default: where there is no such entry; None: there must be one, unless it is `optional`.
    """

    name: str
    option: str = ""
    default: float | None = None
    optional: bool = False


@dataclass(frozen=True)
class ModelDescription:
    """One diffusion transformer. Names of dtypes are those of torch, without its prefix.

    Args:
        family: what messages and tables call it; nothing else goes by it.
        comfyui: its class is ComfyUI's own, whose twin on the host knows latents, sampling and prompts.
        latent: what it draws.
        sampling: how time becomes noise, and what it predicts; None where only the twin knows.
        prompt: what a CONDITIONING brings; empty where the twin knows.
        guided: by a second, negative prompt; False where guidance is distilled into the model.
        rows_apart: rows of a batch do not depend on each other.
        heads, width: attention heads and numbers per token; None where they are not known.
        blocks: transformer blocks, of which `dual` attend to the image tokens a second time.
        streams: sequences of tokens that pass through the blocks (image, text ...); empty is not known.
        text_tokens: a prompt's usual length.
        products: multiplications per token and block, in units of width squared.
        parameters: numbers in all weights.
        stored, dtype: of the file, and of the ranks' weights.
        manual_cast: what is computed in where that is another dtype.
        quantised: layers have formats of their own.
        planned: a class of ComfyUI's has a plan, so that it can be proven that its tokens are spread rightly.
        not_spread: why they are not, as far as is known when it is asked; "" is spread.
        around: methods with weights that ComfyUI calls around the forward, of a class that has them.
        keeping: methods that begin to keep keys of earlier frames, of a class that has them.
        remade: entries of arguments, as "argument.entry", that the class makes anew where they are left out.
        twin: of a class whose weights have diffusers' names alone, what ComfyUI would tell the model by (its
            unet_config), where it may know it; None where the twin is made from the file.
        beside: channels that a call has behind the latent's: pictures a video begins with, masks.
        skips: blocks read the outputs of much earlier ones, which PipeFusion sends along.
    """

    family: str
    comfyui: bool
    latent: LatentSpace
    sampling: Sampling | None
    prompt: tuple[PromptPart, ...]
    guided: bool
    rows_apart: bool
    heads: int | None
    width: int | None
    blocks: int
    dual: int
    streams: tuple[str, ...]
    text_tokens: int
    products: float
    parameters: int
    stored: str
    dtype: str
    manual_cast: str | None = None
    quantised: bool = False
    planned: bool = False
    not_spread: str = ""
    around: tuple[str, ...] = ()
    keeping: tuple[str, ...] = ()
    remade: tuple[str, ...] = ()
    twin: tuple[tuple[str, Any], ...] | None = None
    beside: int = 0
    skips: bool = False

    @classmethod
    def of(cls, told: Any) -> ModelDescription:
        """From its plain form.

        Raises:
            InvalidInput: an entry is missing or unknown.
        """
        given = _checked(cls, told)
        sampling, twin = given["sampling"], given["twin"]
        names = ("streams", "around", "keeping", "remade")
        return cls(
            **given
            | {
                "latent": _built(LatentSpace, given["latent"]),
                "sampling": None if sampling is None else _built(Sampling, sampling),
                "prompt": tuple(_built(PromptPart, part) for part in given["prompt"]),
            }
            | {name: tuple(given[name]) for name in names}
            | {"twin": None if twin is None else tuple((name, value) for name, value in twin)}
        )

    def plain(self) -> dict[str, Any]:
        """What crosses the bridge: dicts, tuples, numbers and names."""
        return asdict(self)


def _built(kind: type, told: Any) -> Any:
    given = _checked(kind, told)
    return kind(**{name: tuple(v) if isinstance(v, list) else v for name, v in given.items()})


def _checked(kind: type, told: Any) -> dict[str, Any]:
    """`told`, which has an entry for every field of `kind` and no other."""
    names = {field.name for field in fields(kind)}
    given = set(told) if isinstance(told, Mapping) else set()
    if given != names:
        lacking, strange = (", ".join(sorted(some)) or "nothing" for some in (names - given, given - names))
        raise InvalidInput(
            f"a model is described ({kind.__name__}) without {lacking} and with {strange} that this version "
            "does not know: the ranks run another version of comfy_xdit than this process; restart ComfyUI."
        )
    return dict(told)
