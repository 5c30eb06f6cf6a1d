"""The handle of text encoders in the ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from comfy_xdit.protocol.messages import EncodeText
from comfy_xdit.remote.base import Interrupt, Remote


@dataclass
class RemoteTextEncoders(Remote):
    """The text encoders of a pipeline, in rank 0."""

    ranks = (0,)

    def encode(
        self, prompts: dict[str, list[list[tuple[str, float]]]], interrupted: Interrupt | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Encode chunks of (text, weight) per encoder (l, g, t5xxl).

        Returns:
            context (1, T, D) and pooled (1, P), fp32 on CPU.
        """
        value = self._call(EncodeText(self.spec, prompts), interrupted=interrupted).value
        return value["cond"], value["pooled"]
