"""Outputs of blocks on their way from stage to stage."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch

from worker.parallel.pipefusion.head import Output
from worker.parallel.pipeline import Pipeline
from worker.parallel.plan import PlanMismatch


class Travel:
    """What one stage receives and sends in a run: of each call in one message.

    Shapes go ahead of the first call of each kind; later ones have the same.
    """

    def __init__(self, pipeline: Pipeline):
        self._pipeline = pipeline
        self._sent: set[Hashable] = set()
        self._known: dict[Hashable, dict[str, Any]] = {}

    def send(self, kind: Hashable, outputs: Sequence[Output], lengths: dict[str, int]) -> None:
        """To the next stage.

        Args:
            kind: of call: those of one kind have outputs of one shape.
            lengths: of the streams, which the next stage has to know.
        """
        lists = [[output] if isinstance(output, torch.Tensor) else list(output) for output in outputs]
        tensors = [tensor for of_block in lists for tensor in of_block if tensor is not None]
        dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors}
        if len(dtypes) > 1:
            raise PlanMismatch(f"blocks return {' and '.join(sorted(dtypes))}, and one dtype travels")
        if kind not in self._sent:
            self._sent.add(kind)
            shapes = [[None if one is None else list(one.shape) for one in of_block] for of_block in lists]
            single = [isinstance(output, torch.Tensor) for output in outputs]
            known = {"shapes": shapes, "single": single, "dtype": dtypes.pop(), "lengths": lengths}
            self._pipeline.tell(known)
        flat = [tensor.reshape(-1) for tensor in tensors]
        self._pipeline.send(flat[0] if len(flat) == 1 else torch.cat(flat))

    def receive(self, kind: Hashable) -> tuple[list[Output], dict[str, int]]:
        """Outputs and lengths that the stage before has sent."""
        if kind not in self._known:
            self._known[kind] = self._pipeline.told()
        known = self._known[kind]
        sizes = [
            torch.Size(one).numel() for of_block in known["shapes"] for one in of_block if one is not None
        ]
        flat = self._pipeline.receive((sum(sizes),), getattr(torch, known["dtype"]))
        pieces, outputs = iter(flat.split(sizes)), []
        for of_block, single in zip(known["shapes"], known["single"], strict=True):
            tensors = [None if one is None else next(pieces).view(one) for one in of_block]
            outputs.append(tensors[0] if single else tuple(tensors))
        return outputs, known["lengths"]
