"""PipeFusion in one process for ComfyUI's classes: whole calls of theirs whose keys are stale."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from tests.stale_keys import StaleKeys

# By class: where its attention is called, and the modules whose it is, with how they join their streams.
PLACES: dict[str, tuple[str, dict[str, str]]] = {
    "Flux": (
        "comfy.ldm.flux.math.optimized_attention",
        {r"double_blocks\.\d+": "text image", r"single_blocks\.\d+": "text image"},
    ),
    "WanModel": ("comfy.ldm.wan.model.optimized_attention", {r"blocks\.\d+\.self_attn": "image"}),
    "QwenImageTransformer2DModel": (
        "comfy.ldm.qwen_image.model.optimized_attention_masked",
        {r"transformer_blocks\.\d+\.attn": "text image"},
    ),
}
Attention = Callable[..., torch.Tensor]


class StaleClass(StaleKeys):
    """Makes the attention of one of ComfyUI's classes see stale keys."""

    def __init__(self, model: torch.nn.Module, tokens: int):
        super().__init__(model, tokens)
        self._place, _ = PLACES[type(model).__name__]

    @staticmethod
    def _order(model: str, name: str) -> str:
        return next((o for form, o in PLACES[model][1].items() if re.fullmatch(form, name)), "")

    @contextmanager
    def catching(self) -> Iterator[None]:
        """Within, ComfyUI's attention in the class's module is this one."""
        path, _, name = self._place.rpartition(".")
        module = importlib.import_module(path)
        before = getattr(module, name)
        setattr(module, name, self._stale(before))
        try:
            yield
        finally:
            setattr(module, name, before)

    def _stale(self, before: Attention) -> Attention:
        def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, *args, **options):
            if self._running:
                apart = options.get("skip_reshape", False)
                # (B, 1, tokens, heads * width) serves as well as (B, heads, tokens, width).
                k, v = self._seen(*(t if apart else t[:, None] for t in (k, v)))
                k, v = (t if apart else t[:, 0] for t in (k, v))
            return before(q, k, v, heads, *args, **options)

        return attention
