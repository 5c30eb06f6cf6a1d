"""Prompts of different length in one call of the transformer.

ComfyUI puts two conditionings into one batch only when their shapes are equal, so a positive and a
negative prompt of different length would be two calls, and CFG parallel would have nothing to
spread. Here the shorter one is padded, its true length travels along as the condition
`context_lengths`, and the ranks cut the padding off before they compute.
"""

from __future__ import annotations

import inspect
import weakref
from typing import Any

import comfy.conds
import torch
from comfy.patcher_extension import WrappersMP

from comfy_xdit.comfy_types.model.controlnet import runs_in_ranks
from comfy_xdit.protocol.messages import LENGTHS

# Wrappers of these kinds see the padded prompts and could change or lengthen them, or judge a call by
# what is in it (EasyCache).
SEEING = (WrappersMP.APPLY_MODEL, WrappersMP.DIFFUSION_MODEL)


class Prompt(comfy.conds.CONDRegular):
    """A context (B, T, D). One that `pairs` goes into one batch with one of another length."""

    def __init__(self, cond: torch.Tensor, pairs: bool):
        super().__init__(cond)
        self.pairs = pairs

    def _copy_with(self, cond: torch.Tensor) -> Prompt:
        return type(self)(cond, self.pairs)

    def can_concat(self, other: Any) -> bool:
        """Whether both can be in one batch."""
        if self.cond.shape == other.cond.shape:
            return super().can_concat(other)
        ours, theirs = self.cond, other.cond
        fits = ours.shape[2:] == theirs.shape[2:] and ours.device == theirs.device
        return fits and self.pairs and isinstance(other, Prompt) and other.pairs

    def concat(self, others: list[Any]) -> torch.Tensor:
        """All of them as one batch, padded with zeros to the longest."""
        contexts = [self.cond, *(other.cond for other in others)]
        longest = max(context.shape[1] for context in contexts)
        return torch.cat(
            [torch.nn.functional.pad(context, (0, 0, 0, longest - context.shape[1])) for context in contexts]
        )


class Lengths(comfy.conds.CONDRegular):
    """The true lengths (B,) of a `Prompt`, which decides what goes into one batch."""

    def can_concat(self, other: Any) -> bool:
        """Always: the prompts beside them decide."""
        return isinstance(other, Lengths)

    def concat(self, others: list[Any]) -> torch.Tensor | None:
        """The lengths of one batch, or None where nothing is padded."""
        lengths = torch.cat([self.cond, *(other.cond for other in others)])
        return lengths if len(lengths.unique()) > 1 else None


def pair_prompts(twin: Any) -> None:
    """Have `twin`, a BaseModel, make conditionings that go into one batch whatever their length."""
    forward = inspect.signature(type(twin.diffusion_model).forward)
    if not any(p.kind is p.VAR_KEYWORD for p in forward.parameters.values()):
        return
    stock, owner = type(twin).extra_conds, weakref.ref(twin)  # no cycle through its own method

    def extra_conds(**kwargs: Any) -> dict[str, Any]:
        twin = owner()
        conds = stock(twin, **kwargs)
        prompt = conds.get("c_crossattn")
        if type(prompt) is comfy.conds.CONDRegular and _arrives_unchanged(twin.current_patcher):
            # A stock ControlNet reads the prompts on the host, and hooks may: they get them as they are.
            pairs = runs_in_ranks(kwargs.get("control")) and kwargs.get("hooks") is None
            count, length = prompt.cond.shape[:2]
            conds["c_crossattn"] = Prompt(prompt.cond, pairs)
            conds[LENGTHS] = Lengths(torch.full((count,), length))
        return conds

    twin.extra_conds = extra_conds


def _arrives_unchanged(patcher: Any) -> bool:
    """False where something between sampler and transformer sees the prompts, and outside a run."""
    if patcher is None:
        return False
    options = patcher.model_options
    if options.get("model_function_wrapper") or options.get("context_handler"):
        return False
    registered = (patcher.wrappers, options.get("transformer_options", {}).get("wrappers", {}))
    return not any(any(wrappers.get(kind, {}).values()) for wrappers in registered for kind in SEEING)
