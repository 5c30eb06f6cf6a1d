"""What a family must say about its IP-Adapters: adapters that make pictures a prompt.

Paper: IP-Adapter, arXiv:2308.06721. The formats and the sums are those of diffusers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from worker.checkpoints import Shapes

# What ComfyUI's CLIP Vision Encode makes of pictures, and how many dimensions that has.
IMAGE_OUTPUTS = {"image_embeds": 2, "penultimate_hidden_states": 3}
# Of (query, key, value) of this rank's image tokens and (key, value) of more tokens, which every rank has.
ImageAttention = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor
]


@dataclass(frozen=True)
class Acting:
    """An adapter at work in one call: what it made of the pictures, one row per row of the call.

    Args:
        tokens: (B, tokens, width).
        time: what modulates them, (B, width); None where nothing does.
    """

    adapter: Any
    weight: float
    tokens: torch.Tensor
    time: torch.Tensor | None = None


class IPAdapter(nn.Module, ABC):
    """The weights of one adapter of a family.

    Args (of every subclass):
        shapes: of the file's tensors, under the names they have in this module.
        config: of the transformer.
    """

    takes: ClassVar[str]  # one of IMAGE_OUTPUTS
    encoder: ClassVar[str]  # the usual image encoder, for messages
    most_pictures: ClassVar[int] = 0  # at once; 0 is any number
    width: int  # of what it takes
    places: int  # how many attentions it adds to

    @classmethod
    @abstractmethod
    def sources(cls, names: Iterable[str]) -> dict[str, str]:
        """For each tensor of this module its name in a file of `names`; empty where it is for others."""

    @classmethod
    @abstractmethod
    def attach(cls, transformer: nn.Module, acting: Sequence[Acting], attention: ImageAttention) -> None:
        """Register hooks on a diffusers transformer that add what `acting` holds when it is called."""

    @abstractmethod
    def act(self, embeds: torch.Tensor, timestep: torch.Tensor, weight: float) -> Acting:
        """What the pictures say in one call. `embeds` are (B, N, ...), `timestep` is (B,)."""


def heads_first(tokens: torch.Tensor, heads: int) -> torch.Tensor:
    """(B, tokens, heads * width) to (B, heads, tokens, width)."""
    return tokens.unflatten(-1, (heads, -1)).transpose(1, 2)


def count(shapes: Shapes, prefix: str) -> int:
    """How many numbers there are behind `prefix` in the names."""
    return len({name[len(prefix) :].split(".", 1)[0] for name in shapes if name.startswith(prefix)})
