"""A class of ComfyUI's with its tokens over ranks: its plan, its attention, its ControlNets' residuals."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from comfy_xdit.protocol.messages import Residuals
from worker.models.plans.comfyui import PLANS, REASONS
from worker.parallel import Mesh, Plan, PlanMismatch, Region, SpreadTokens, WithLogSumExp, catching, choosing

PATCHED = "image"  # what all plans call the tokens of a picture, which PipeFusion cuts into patches
# What modules of ComfyUI call for attention; each has its own name for the one that was chosen.
ATTENTION = {
    "optimized_attention": catching,
    "optimized_attention_masked": catching,
    "optimized_attention_for_device": choosing,
}


def planned_classes() -> list[str]:
    """Names of the classes that have a plan."""
    return sorted(PLANS)


def candidates(name: str) -> tuple[Plan, ...]:
    """The plans of a class, of which the proof chooses the first that is right.

    Raises:
        PlanMismatch: it has none.
    """
    if name not in PLANS:
        raise PlanMismatch(REASONS.get(name, f"comfy_xdit has no plan for ComfyUI's {name}"))
    plans = PLANS[name]
    # What a region says, and the proof, decide whether they can be cut into patches.
    return tuple(replace(plan, patched=PATCHED) for plan in (plans if isinstance(plans, tuple) else (plans,)))


class Spread:
    """A module whose tokens are spread over the ranks of a mesh, in its own forward.

    Args:
        plan: of its class.
        deaf: as of SpreadTokens.

    Raises:
        PlanMismatch: this ComfyUI's class is not the one its plan was written for.
    """

    def __init__(
        self,
        module: nn.Module,
        plan: Plan,
        mesh: Mesh,
        kernel: WithLogSumExp | None = None,
        deaf: bool = False,
    ):
        catch_attention()
        self.tokens = SpreadTokens(module, plan, mesh, kernel, deaf)
        self._hooks = []
        self._control: dict[str, list[torch.Tensor | None]] = {}
        for region in plan.regions:
            if region.control:
                self._cut_residuals_in(region, module)

    def residuals(self, control: Residuals | None) -> dict[str, Any] | None:
        """Of the next call: the same lists, of which each rank gets its part where its tokens are cut."""
        self._control = {name: list(given) for name, given in (control or {}).items()}
        return self._control or None

    def close(self) -> None:
        """Leave the module as it was."""
        self.tokens.close()
        for hook in self._hooks:
            hook.remove()

    def _cut_residuals_in(self, region: Region, module: nn.Module) -> None:
        lists = [name for name in region.blocks if len(module.get_submodule(name))]
        first = next(iter(module.get_submodule(lists[0]).children()))

        def cut(*_: Any) -> None:
            control, self._control = self._control, {}
            for name, (blocks, streams) in region.control.items():
                # Behind the last block tokens are whole again, unless they are gathered later.
                whole = -1
                if not region.at and blocks == lists[-1]:
                    whole = len(module.get_submodule(blocks)) - 1
                for i, residual in enumerate(control.get(name, ())):
                    if residual is not None and i != whole:
                        control[name][i] = self._part(residual, streams)

        self._hooks.append(first.register_forward_pre_hook(cut))

    def _part(self, residual: torch.Tensor, streams: str) -> torch.Tensor:
        """This rank's of what is added to the first image tokens (B, n, D)."""
        part = self.tokens.own(residual, "image")
        if streams == "image":
            return part
        # Added to as many rows as the whole picture has: here the text's are among them.
        parts = self.tokens.parts
        rows = min(parts["image"].length, sum(parts[name].size for name in streams.split()))
        return torch.cat([part, part.new_zeros(part.shape[0], rows - part.shape[1], part.shape[2])], 1)


def catch_attention() -> None:
    """Have the seam in every module of ComfyUI that has been imported."""
    for name, module in list(sys.modules.items()):
        if name.startswith("comfy."):
            for attention, caught in ATTENTION.items():
                original = vars(module).get(attention)
                if callable(original) and not hasattr(original, "original"):
                    setattr(module, attention, caught(original))
