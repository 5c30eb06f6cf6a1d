"""The rows of one call of the transformer: pictures, each with its prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import pad

from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.messages import LENGTHS, ImagePrompt, Residuals

if TYPE_CHECKING:
    from worker.transformer.controlnets import NetCall

OPTIONS = "transformer_options"  # of ComfyUI's classes: about the whole call, never about one row
Rows = slice | list[int]


@dataclass(frozen=True)
class Pictures:
    """Image prompts of one call; rows that are True in `negative` (B,) see zeros instead."""

    prompts: tuple[ImagePrompt, ...]
    negative: torch.Tensor

    @classmethod
    def of(cls, prompts: Sequence[ImagePrompt], negative: torch.Tensor) -> Pictures | None:
        """None where there are no prompts."""
        return cls(tuple(prompts), negative) if prompts else None


@dataclass(frozen=True)
class Batch:
    """ComfyUI's arguments of one call (see `messages.Denoise`); `x` may be several latents at once.

    Prompts of different length come as one context, padded behind, with their true lengths (B,) in
    the condition `context_lengths`. `nets` are the ControlNets that run beside the transformer,
    `pictures` what prompts it through IP-Adapters.
    """

    x: torch.Tensor | list[torch.Tensor]
    timestep: torch.Tensor | tuple[torch.Tensor, ...]
    conditions: dict[str, Any]
    control: Residuals | None = None
    nets: tuple[NetCall, ...] = ()
    pictures: Pictures | None = None

    def __len__(self) -> int:
        return (self.x if isinstance(self.x, torch.Tensor) else self.x[0]).shape[0]

    def rows(self, rows: Rows) -> Batch:
        """Some of the rows. What has no row of its own (one guidance for all) is left whole."""
        size = len(self)

        def cut(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return value[rows] if value.ndim and value.shape[0] == size else value
            if isinstance(value, dict):
                return {name: part if name == OPTIONS else cut(part) for name, part in value.items()}
            return type(value)(map(cut, value)) if isinstance(value, (list, tuple)) else value

        nets = tuple(replace(net, hint=cut(net.hint)) for net in self.nets)
        pictures = self.pictures and replace(self.pictures, negative=self.pictures.negative[rows])
        return Batch(cut(self.x), cut(self.timestep), cut(self.conditions), cut(self.control), nets, pictures)

    @property
    def calls(self) -> int:
        """How many batches `by_length` gives, of which none has no row."""
        if len(self) == 0:
            return 0
        return len(set(self.conditions[LENGTHS].tolist())) if LENGTHS in self.conditions else 1

    def by_length(self) -> Iterator[tuple[list[int], Batch]]:
        """Rows whose prompts are of one length, without padding, and where they stand in this batch."""
        if LENGTHS not in self.conditions:
            yield list(range(len(self))), self
            return
        lengths = self.conditions[LENGTHS].tolist()
        for length in dict.fromkeys(lengths):
            rows = [i for i, other in enumerate(lengths) if other == length]
            group = self if len(rows) == len(lengths) else self.rows(rows)
            conditions = {name: value for name, value in group.conditions.items() if name != LENGTHS}
            conditions["context"] = conditions["context"][:, :length]
            yield rows, replace(group, conditions=conditions)


def join(sides: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The conditions of several sides of guidance as one batch, one side behind the other.

    Each is (B, ...); contexts of different length are padded and get `context_lengths`. None when the
    sides differ in more than that (a reference picture on one of them only): they are two calls.
    """
    # A class without a prompt, of labels, has no context.
    lengths = [side["context"].shape[1] if "context" in side else 0 for side in sides]
    padded = [
        {
            name: pad(v, (0, 0, 0, max(lengths) - length)) if name == "context" else v
            for name, v in side.items()
        }
        for side, length in zip(sides, lengths, strict=True)
    ]
    if any(_outline(side) != _outline(padded[0]) for side in padded):
        return None
    joined = {name: _behind([side[name] for side in padded]) for name in padded[0]}
    if len(set(lengths)) > 1:
        rows = [length for side, length in zip(sides, lengths, strict=True) for _ in side["context"]]
        joined[LENGTHS] = torch.tensor(rows)
    return joined


def _outline(value: Any) -> Any:
    """What must be equal for values to be in one batch: everything but the content of tensors."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, dict):
        return {name: _outline(part) for name, part in value.items()}
    return [_outline(part) for part in value] if isinstance(value, (list, tuple)) else value


def _behind(values: list[Any]) -> Any:
    """Values of one outline, one behind the other."""
    if isinstance(values[0], torch.Tensor):
        return torch.cat(values)
    if isinstance(values[0], (list, tuple)):
        return [_behind(list(parts)) for parts in zip(*values, strict=True)]
    return values[0]


def check_lengths(conditions: dict[str, Any], batch: int) -> None:
    """Raise InvalidInput when `context_lengths` does not say how the context was padded.

    A node that changed the context after the host padded it would be cut short in silence.
    """
    lengths, context = conditions.get(LENGTHS), conditions.get("context")
    if lengths is None:
        return
    fits = (
        isinstance(context, torch.Tensor)
        and tuple(lengths.shape) == (batch,) == tuple(context.shape[:1])
        and int(lengths.min()) > 0
        and int(lengths.max()) == context.shape[1]
    )
    if not fits:
        shape = tuple(context.shape) if isinstance(context, torch.Tensor) else None
        raise InvalidInput(
            f"the prompts' lengths {lengths.tolist()} do not fit a context of shape {shape} for {batch} "
            "pictures: a node changed the prompts between the sampler and the transformer. Remove that node."
        )
