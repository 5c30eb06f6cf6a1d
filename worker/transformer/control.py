"""Residuals of ControlNets, added to the image tokens after the blocks they belong to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.messages import Residuals


class ControlResiduals:
    """Forward hooks on the blocks of a diffusers transformer that add what a call brought along.

    Args:
        transformer: its blocks return (text, image).
        places: for each list of residuals the module list whose blocks it belongs to, in order.
        own: this rank's part of image tokens (B, tokens, width).
    """

    def __init__(
        self,
        transformer: nn.Module,
        places: Mapping[str, str],
        own: Callable[[torch.Tensor], torch.Tensor],
    ):
        self._own = own
        self._whole: Sequence[Residuals] = ()
        self._parts: Residuals = {}
        for place, blocks in places.items():
            for index, block in enumerate(transformer.get_submodule(blocks)):
                block.register_forward_hook(partial(self._add, place, index))

    @contextmanager
    def of(self, whole: Sequence[Residuals | None], parts: Residuals) -> Iterator[None]:
        """Within, the transformer's blocks get these residuals.

        Args:
            whole: on all image tokens, or on the first of them; each is added.
            parts: on this rank's part of the image tokens, as ControlNets in the ranks compute them.
        """
        self._whole, self._parts = [residuals for residuals in whole if residuals], parts
        try:
            yield
        finally:
            self._whole, self._parts = (), {}

    def _add(
        self, place: str, index: int, _block: nn.Module, _args: Any, output: tuple[torch.Tensor, torch.Tensor]
    ) -> None:
        # In place, as ComfyUI does it: the sum is rounded once to the dtype of the tokens.
        for residuals in self._whole:
            whole = _at(residuals, place, index)
            if whole is not None:
                own = self._own(whole)
                output[1][:, : own.shape[1]] += own
        part = _at(self._parts, place, index)
        if part is not None:
            output[1][:, : part.shape[1]] += part


def _at(residuals: Residuals, place: str, index: int) -> torch.Tensor | None:
    given = residuals.get(place, ())
    return given[index] if index < len(given) else None


def check_residuals(
    residuals: Residuals | None, places: Mapping[str, str], batch: int, tokens: int, width: int
) -> None:
    """Raise InvalidInput for a residual that does not fit (batch, tokens, width).

    Fewer tokens are right: what comes after the picture (reference latents) has no residual.
    """
    for place in places:
        for residual in (residuals or {}).get(place, ()):
            if residual is None:
                continue
            shape = tuple(residual.shape)
            fits = len(shape) == 3 and shape[0] in (1, batch) and shape[1] <= tokens and shape[2] == width
            if not fits:
                raise InvalidInput(
                    f"a ControlNet's residual has shape {shape}, the transformer takes ({batch}, at most "
                    f"{tokens}, {width}); use a ControlNet made for this model."
                )
