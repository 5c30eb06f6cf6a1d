"""What a case is made of: random arguments, a size, a call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from worker.models.comfyui.cases.sizes import TEXT, Size
from worker.models.plans.traits import traits_of

PROMPT = 11  # tokens
STILL, VIDEO = (10, 14), (3, 10, 14)  # 35 and 105 tokens in patches of 2
SMALL, SMALL_VIDEO = (5, 7), (3, 5, 7)  # as many in patches of 1
FLOW, THOUSANDS = 0.5, 500.0  # a timestep


class Draw:
    """Random arguments for a call of `batch` rows."""

    def __init__(self, batch: int, seed: int = 1):
        self.batch, self._generator = batch, torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> torch.Tensor:
        """(B, *shape)."""
        return torch.randn(self.batch, *shape, generator=self._generator)

    def time(self, value: float = FLOW) -> torch.Tensor:
        """(B,), all the same."""
        return torch.full((self.batch,), value)

    def prompt(self, width: int = TEXT, tokens: int = PROMPT) -> torch.Tensor:
        """(B, tokens, width)."""
        return self(tokens, width)

    def mask(self) -> torch.Tensor:
        """(B, tokens): the last two of a prompt do not count."""
        mask = torch.ones(self.batch, PROMPT, dtype=torch.int64)
        mask[:, -2:] = 0
        return mask

    def residuals(self, inputs: int, outputs: int, tokens: int = 35, width: int = 64) -> dict[str, Any]:
        """What ControlNets add after so many blocks of each kind."""
        return {
            "input": [self(tokens, width) for _ in range(inputs)],
            "output": [self(tokens, width) for _ in range(outputs)],
        }


Call = Callable[[Draw], tuple[tuple[Any, ...], dict[str, Any]]]


@dataclass(frozen=True)
class Case:
    """A class of `module` (in comfy.ldm), a size of it, and a call.

    Args:
        parts: classes of the module that it builds in their full size, and what they are told in its place.
        batches: rows that the class itself takes.
        build: makes the tiny model of the class (and size, device, dtype, operations) whose constructor takes
            no size.
        causal: tokens attend to earlier ones only, so that no patch sees keys that are not renewed.
    """

    module: str
    name: str
    size: Size
    call: Call
    parts: Mapping[str, Size] = field(default_factory=dict)
    batches: tuple[int, ...] = (1, 2, 3)
    causal: bool = False
    build: Callable[..., Any] | None = None

    def outputs(self, model: Any, *args: Any, **kwargs: Any) -> list[torch.Tensor]:
        """What a model gives in a call, and in the same one again if it keeps something."""
        if forget := traits_of(self.name).forget:
            getattr(model, forget)()
        found: list[torch.Tensor] = []
        for _ in range(2 if forget else 1):
            out = model(*args, **kwargs)
            found += [out] if isinstance(out, torch.Tensor) else list(out)
        return found
