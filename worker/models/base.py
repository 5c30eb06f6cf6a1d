"""What a family of diffusion transformers must say about itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from comfy_xdit.protocol.description import LatentSpace, PromptPart
from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.sampling import Sampling
from worker.checkpoints import Shapes, Source
from worker.models.ip_adapter import IPAdapter
from worker.parallel import Plan

MAX_BLOCKS = 200  # of one kind; the largest published models have some sixty
PATCH = 2  # latent pixels per side of a token of `packed`


@dataclass(frozen=True)
class Call:
    """Arguments of the diffusers transformer, and what the engine must know about them."""

    kwargs: dict[str, Any]
    image_tokens: int


class ModelFamily(ABC):
    """One family: told by its tensors, built as its diffusers class, called as ComfyUI calls it."""

    name: str
    native: str  # a tensor that a file in the original release's naming has, and no other
    configurations: frozenset[str]  # ComfyUI's names of the models that this family covers
    plan: Plan
    text_tokens: int  # a prompt's usual length
    products: float = 12.0  # multiplications per token and block, in units of width squared
    guided: bool = True  # by a second, negative prompt; False where guidance is distilled into the model
    # Which blocks ComfyUI adds each list of ControlNet residuals after.
    control: dict[str, str]
    ip_adapter: type[IPAdapter] | None = None  # how pictures prompt this family, where they can
    # Keyword arguments of ComfyUI's transformer that the family takes; any other is refused.
    conditions: frozenset[str]

    @abstractmethod
    def detect(self, shapes: Shapes) -> bool:
        """True when a checkpoint with these tensors, in either naming, is of this family."""

    @abstractmethod
    def config(self, shapes: Shapes) -> dict[str, Any]:
        """Arguments of the diffusers class, derived from tensor shapes."""

    @abstractmethod
    def build(self, config: dict[str, Any]) -> nn.Module:
        """The diffusers transformer, without weights."""

    def prepare(self, module: nn.Module) -> None:  # noqa: B027 - most families need nothing
        """Put right on the loaded transformer where diffusers computes otherwise than ComfyUI."""

    @abstractmethod
    def native_mapping(self, config: dict[str, Any]) -> dict[str, Source]:
        """For every tensor of the diffusers class its source under the original release's names."""

    def lora_names(self, config: dict[str, Any]) -> dict[str, Source]:
        """Weights under names that only LoRA files have: neither the original release's nor diffusers'."""
        return {}

    def mapping(self, shapes: Shapes, config: dict[str, Any]) -> dict[str, Source]:
        """For every tensor of the diffusers class its source in the file."""
        return self.native_mapping(config) if self.native in shapes else {key: Source(key) for key in shapes}

    @abstractmethod
    def sampling(self, config: dict[str, Any]) -> Sampling:
        """How ComfyUI samples this model."""

    @abstractmethod
    def latent(self, config: dict[str, Any]) -> LatentSpace:
        """What the transformer draws, with ComfyUI's constants of the family."""

    @abstractmethod
    def prompt(self, config: dict[str, Any]) -> tuple[PromptPart, ...]:
        """What a CONDITIONING must bring."""

    def heads(self, config: dict[str, Any]) -> int:
        """Attention heads."""
        return config["num_attention_heads"]

    def width(self, config: dict[str, Any]) -> int:
        """Numbers per token between blocks."""
        return self.heads(config) * config["attention_head_dim"]

    def dual(self, config: dict[str, Any]) -> int:
        """Blocks whose image tokens attend to each other a second time."""
        return 0

    def beside(self, config: dict[str, Any]) -> int:
        """Channels that a call has behind the latent's."""
        return 0

    def twin(self, config: dict[str, Any]) -> tuple[tuple[str, Any], ...] | None:
        """What ComfyUI would tell the model by; None where its twin is made from the file."""
        return None

    @abstractmethod
    def call(
        self, config: dict[str, Any], x: torch.Tensor, timestep: torch.Tensor, conditions: dict[str, Any]
    ) -> Call:
        """ComfyUI's call in diffusers' terms. `x` is padded to whole patches already."""

    @abstractmethod
    def output(self, config: dict[str, Any], sample: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """diffusers' output as a latent shaped like `x`."""

    def check_conditions(self, conditions: dict[str, Any]) -> dict[str, Any]:
        """The conditions that are set. Raises InvalidInput for one the family does not take."""
        given = {k: v for k, v in conditions.items() if v is not None}
        unknown = sorted(set(given) - self.conditions)
        if unknown:
            raise InvalidInput(
                f"the conditioning carries {', '.join(unknown)}, which {self.name} in the ranks does not "
                f"take (it takes {', '.join(sorted(self.conditions))}); remove the node that adds it."
            )
        return given

    def tensor(self, conditions: dict[str, Any], name: str, width: int) -> torch.Tensor:
        """A condition whose last dimension is `width`. Raises InvalidInput otherwise."""
        value = conditions.get(name)
        if not isinstance(value, torch.Tensor):
            raise InvalidInput(
                f"the conditioning has no {name}; encode the prompt with the text encoders of {self.name}."
            )
        if value.shape[-1] != width:
            raise InvalidInput(
                f"{name} is {value.shape[-1]} wide, {self.name} takes {width}; encode the prompt with the "
                f"text encoders of {self.name} (another model's CLIP does not fit)."
            )
        return value


def to_whole_patches(x: torch.Tensor, patch: Sequence[int]) -> torch.Tensor:
    """Pad the last dimensions to whole patches of so many elements, circularly as ComfyUI does."""
    behind = [-size % part for size, part in zip(x.shape[-len(patch) :], patch, strict=True)]
    if not any(behind):
        return x
    around = [side for size in reversed(behind) for side in (0, size)]
    return torch.nn.functional.pad(x, around, mode="circular")


def packed(x: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) of whole patches to tokens (B, H/2 * W/2, C * 4)."""
    batch, channels, height, width = x.shape
    patches = x.reshape(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, (height // PATCH) * (width // PATCH), -1)


def unpacked(tokens: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """The first tokens as a latent with height and width of `shape`."""
    batch, rows, columns = shape[0], shape[-2] // PATCH, shape[-1] // PATCH
    patches = tokens[:, : rows * columns].reshape(batch, rows, columns, -1, PATCH, PATCH)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(batch, -1, rows * PATCH, columns * PATCH)


def depth(shapes: Shapes, prefix: str) -> int:
    """How many numbered blocks there are under `prefix`.

    Raises:
        InvalidInput: numbers beyond MAX_BLOCKS.
    """
    words = {key[len(prefix) :].split(".", 1)[0] for key in shapes if key.startswith(prefix)}
    last = max((word for word in words if word.isascii() and word.isdigit()), key=_magnitude, default=None)
    if last is None:
        return 0
    if _magnitude(last) >= _magnitude(str(MAX_BLOCKS)):
        raise InvalidInput(
            f"a tensor is of block {prefix}{last}, and no known model has more than {MAX_BLOCKS} of them; "
            "the file is damaged: download it again."
        )
    return int(last) + 1


def _magnitude(digits: str) -> tuple[int, str]:
    """Orders numbers of any length without computing with them."""
    digits = digits.lstrip("0")
    return len(digits), digits


def whole(key_to: str, key_from: str) -> dict[str, Source]:
    """Weight and bias under another name."""
    return {f"{key_to}.{part}": Source(f"{key_from}.{part}") for part in ("weight", "bias")}


def rows(targets: tuple[str, ...], key_from: str, sizes: tuple[int, ...]) -> dict[str, Source]:
    """A fused projection's weight and bias cut into `targets` of so many rows."""
    result, start = {}, 0
    for target, size in zip(targets, sizes, strict=True):
        for part in ("weight", "bias"):
            result[f"{target}.{part}"] = Source(f"{key_from}.{part}", start, start + size)
        start += size
    return result


def swapped(key_to: str, key_from: str) -> dict[str, Source]:
    """Weight and bias with their halves exchanged."""
    return {f"{key_to}.{part}": Source(f"{key_from}.{part}", swap=True) for part in ("weight", "bias")}
