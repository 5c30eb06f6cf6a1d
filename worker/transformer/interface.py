"""What the engine, the sampling loop and the planner need of a loaded transformer, whatever its class is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.messages import Residuals
from worker.parallel import Stage
from worker.patches import LoraFiles, PatchStore
from worker.transformer.batch import Batch
from worker.transformer.controlnets import NetCall

# One latent, or several at once (a video's picture and sound).
Latents = torch.Tensor | list[torch.Tensor] | tuple[torch.Tensor, ...]


class LoadedTransformer(Protocol):
    """A transformer in this rank's memory, or opened to be.

    `nbytes` are those of this rank's weights, known before they are read; `loras` reads files for it.
    """

    @property
    def nbytes(self) -> int: ...

    @property
    def loras(self) -> LoraFiles: ...

    def prove(self) -> None:
        """Raise InvalidInput where ranks find out together that the layout is none for it; on all alike."""

    def load(self) -> None:
        """Read the weights; on all ranks alike."""

    def describe(self) -> dict[str, Any]:
        """What the host needs to know: plain values only."""

    def require(self, what: str) -> None:
        """Raise InvalidInput if only the other kind of class can do `what` (words for a person)."""

    def patch(self, name: str, store: PatchStore) -> int:
        """Have the weight patches of one set. Returns how many weights were written."""

    def check(
        self,
        x: Latents,
        conditions: dict[str, Any],
        control: Residuals | None = None,
        nets: Sequence[NetCall] = (),
    ) -> dict[str, Any]:
        """The conditions to call with. Raises InvalidInput before any rank has begun to compute."""

    def predict_batch(self, batch: Batch) -> Latents:
        """The output of one call; on all ranks alike."""

    def not_finite(self) -> InvalidInput:
        """What to say of an output with values that are not finite."""

    def preprocess(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a method beside the forward returns; on all ranks alike."""


class StagedTransformer(Protocol):
    """One stage of a pipeline (PipeFusion); on all ranks alike."""

    stage: Stage

    def predict_plain(self, batch: Batch) -> torch.Tensor:
        """The stage's part of one call of the transformer."""

    def image_tokens(self, batch: Batch) -> int:
        """How many tokens of the stream that is cut into patches a call has."""

    def idle_calls(self, batches: Sequence[Batch]) -> int:
        """How many calls fewer than another branch this one makes, of the rows of some batches."""

    def gather_unused(self, calls: int) -> None:
        """Give others the weights that they need in so many calls which this rank does not make."""
