"""The handle of text encoders in the ranks."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from comfy_xdit.protocol.messages import EncodeText
from comfy_xdit.remote.base import Interrupt, Remote

_log = logging.getLogger(__name__)


@dataclass
class RemoteTextEncoders(Remote):
    """The text encoders of a pipeline, in rank 0."""

    ranks = (0,)

    def encode(
        self, prompts: dict[str, list[list[tuple[str, float]]]], interrupted: Interrupt | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None, dict[str, torch.Tensor]]:
        """Encode chunks of (text, weight) per encoder, by its name in `info`; logs what was left out.

        Returns:
            context (1, T, D), pooled (1, P) and other entries of a CONDITIONING; fp32 or int64 on CPU.
        """
        value = self._call(EncodeText(self.spec, prompts), interrupted=interrupted).value
        for note in value["notes"]:
            _log.warning("comfy_xdit: %s", note)
        return value["cond"], value["pooled"], value["options"]
