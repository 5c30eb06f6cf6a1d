"""PipeFusion in one process and in plain words: whole calls of diffusers' models whose keys are stale.

Nothing is cut and nothing is the engine's. Every call computes all tokens; but of the tokens that the patch
does not bring, attention sees the keys and values of the call that brought them last. So what comes out for
the patch's own tokens is what PipeFusion makes of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

# By class: the attention between tokens, by the last part of its name, and how it joins its streams.
ORDERS = {
    "SD3Transformer2DModel": {"attn": "image text", "attn2": "image"},
    "FluxTransformer2DModel": {"attn": "text image"},
    "Flux2Transformer2DModel": {"attn": "text image"},
    "PixArtTransformer2DModel": {"attn1": "image"},
    "HunyuanDiT2DModel": {"attn1": "image"},
    "WanTransformer3DModel": {"attn1": "image"},
    "CogVideoXTransformer3DModel": {"attn1": "text image"},
    "QwenImageTransformer2DModel": {"attn": "text image"},
    "HunyuanVideoTransformer3DModel": {"attn": "image text"},
    "HunyuanVideo15Transformer3DModel": {"attn": "image text"},
}
BLOCKS = ("transformer_blocks.", "single_transformer_blocks.", "blocks.")


class StaleKeys:
    """Makes a model's attention see stale keys.

    Args:
        tokens: of the picture.
    """

    def __init__(self, model: nn.Module, tokens: int):
        self._tokens, self._kept, self._running = tokens, {}, []
        self.group = 0  # which rows are computed
        self.fresh: range | None = None  # tokens of the picture that the call brings; None is all
        for name, module in model.named_modules():
            if order := self._order(type(model).__name__, name):
                module.register_forward_pre_hook(lambda *_, at=(name, order): self._running.append(at))
                module.register_forward_hook(lambda *_: self._running.pop() and None)

    @staticmethod
    def _order(model: str, name: str) -> str:
        """How the attention between tokens in a module joins its streams; "" where none is."""
        at_home = name.startswith(BLOCKS) and name.count(".") == 2
        return ORDERS[model].get(name.rpartition(".")[2], "") if at_home else ""

    @contextmanager
    def catching(self) -> Iterator[None]:
        """Within, the attention of PyTorch is this one."""
        before = F.scaled_dot_product_attention

        def attention(
            query: Any, key: Any, value: Any, attn_mask: Any = None, *args: Any, **kwargs: Any
        ) -> Any:
            if self._running:
                key, value = self._seen(key, value)
            return before(query, key, value, attn_mask, *args, **kwargs)

        F.scaled_dot_product_attention = attention
        try:
            yield
        finally:
            F.scaled_dot_product_attention = before

    def _seen(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        name, order = self._running[-1]
        new = torch.stack([key, value])
        if self.fresh is not None:
            picture = torch.zeros(self._tokens, dtype=torch.bool)
            picture[list(self.fresh)] = True
            text = torch.full((key.shape[2] - self._tokens,), self.fresh.start == 0)
            known = {"image": [picture], "text image": [text, picture], "image text": [picture, text]}
            new = torch.where(torch.cat(known[order])[:, None], new, self._kept[self.group, name])
        self._kept[self.group, name] = new
        return new[0], new[1]


def token_of_element(kind: str, shape: torch.Size) -> torch.Tensor:
    """For every element of one picture (plan_cases.py: kinds) its token."""
    n = torch.meshgrid(*(torch.arange(size) for size in shape), indexing="ij")
    if kind == "tokens":
        return n[1].flatten()
    rows, columns = shape[-2] // 2, shape[-1] // 2
    frames = {
        "video": lambda: n[2],
        "frames": lambda: n[1],
        "image": lambda: torch.zeros(1, dtype=torch.long),
    }
    token = frames[kind]() * rows * columns + (n[-2] // 2) * columns + n[-1] // 2
    return token.expand(shape).flatten()


def euler(
    call: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor],
    stale: StaleKeys,
    groups: int,
    x: torch.Tensor,
    tokens: torch.Tensor,
    sigmas: torch.Tensor,
    ends: list[int],
    warm: int,
    combined: Callable[[list[torch.Tensor]], torch.Tensor],
) -> torch.Tensor:
    """A run with `warm` whole steps; afterwards one patch after another.

    Args:
        call: the model's output for (x, sigma, group of rows).
        x: (1, ...). tokens: of its elements.
        ends: the token behind each patch.
        combined: the outputs of all groups, guided.
    """
    x = x.clone()
    for step in range(len(sigmas) - 1):
        for start, end in [(0, ends[-1])] if step < warm else zip([0, *ends], ends, strict=False):
            stale.fresh, outputs = None if step < warm else range(start, end), []
            for stale.group in range(groups):
                with stale.catching():
                    outputs.append(call(x, sigmas[step], stale.group))
            stepped = x + (sigmas[step + 1] - sigmas[step]) * combined(outputs)
            own = ((tokens >= start) & (tokens < end)).view(x.shape)
            x = torch.where(own, stepped, x)
    return x
