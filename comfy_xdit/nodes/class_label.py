"""XDiTClassLabel: a CONDITIONING of models that are told a class, and no text."""

from __future__ import annotations

from typing import Any

LABELS = "class_labels"  # the entry of a CONDITIONING that has them, (1, 1) of int64
MOST = 999_999


class XDiTClassLabel:
    """The class of what is drawn, of models that know no text (DiT-XL)."""

    TITLE = "xDiT Class Label"
    DESCRIPTION = (
        "What to draw, for models that are trained on ImageNet's classes and read no text (DiT-XL): "
        "positive is a class of 0 to 999, negative is -1, no class."
    )
    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "encode"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """One number."""
        number = {"default": 207, "min": -1, "max": MOST, "tooltip": "207 is a golden retriever; -1 is none."}
        return {"required": {"class_label": ("INT", number)}}

    def encode(self, class_label: int) -> tuple[list[Any]]:
        """The label as an option; the prompt beside it, which every CONDITIONING has, is empty."""
        import torch

        return ([[torch.zeros(1, 1, 1), {LABELS: torch.tensor([[class_label]])}]],)
