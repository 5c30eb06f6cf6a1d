"""IP-Adapters of FLUX.1 in XLabs' format, as diffusers computes them.

The image tokens of each double block ask the picture's tokens, with their queries before the rotary
positions; the answer is added behind the block. A query asks by itself: where tokens are spread over
ranks, each rank asks for its own, and nothing is exchanged.
Source: diffusers' FluxIPAdapterAttnProcessor and loaders/ip_adapter.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from worker.checkpoints import Shapes
from worker.models.ip_adapter import Acting, ImageAttention, IPAdapter, heads_first
from worker.parallel import scaled_dot_product_attention

_PROJECTION = {"proj": "projection.image_embeds", "norm": "projection.norm"}
_PARTS = {
    "ip_adapter_double_stream_k_proj": "to_k_ip",
    "ip_adapter_double_stream_v_proj": "to_v_ip",
    "to_k_ip": "to_k_ip",
    "to_v_ip": "to_v_ip",
}


class FluxIPAdapter(IPAdapter):
    """A picture's tokens from its embedding, and keys and values of them for each double block."""

    takes: ClassVar[str] = "image_embeds"
    encoder: ClassVar[str] = "clip-vit-large-patch14"

    def __init__(self, shapes: Shapes, config: dict[str, Any]):
        from diffusers.models.embeddings import ImageProjection

        super().__init__()
        rows, self.width = shapes["projection.image_embeds.weight"]
        hidden = config["num_attention_heads"] * config["attention_head_dim"]
        (width,) = shapes["projection.norm.weight"]
        self.projection = ImageProjection(self.width, width, rows // width)
        self.places = config["num_layers"]
        self.to_k_ip = nn.ModuleList(nn.Linear(width, hidden) for _ in range(self.places))
        self.to_v_ip = nn.ModuleList(nn.Linear(width, hidden) for _ in range(self.places))

    @classmethod
    def sources(cls, names: Iterable[str]) -> dict[str, str]:
        """XLabs' names, or diffusers' own (`image_proj.`, `ip_adapter.`)."""
        found = {}
        for name in names:
            group, *path = name.split(".")
            if group in ("ip_adapter_proj_model", "image_proj") and len(path) == 2 and path[0] in _PROJECTION:
                found[f"{_PROJECTION[path[0]]}.{path[1]}"] = name
            elif group in ("double_blocks", "ip_adapter"):
                path = [part for part in path if part != "processor"]
                if len(path) == 3 and path[1] in _PARTS:
                    found[f"{_PARTS[path[1]]}.{path[0]}.{path[2]}"] = name
        # Half of it is another thing: a LoRA of XLabs has double_blocks, an adapter of SD3 has to_k_ip.
        return found if {name.split(".")[0] for name in found} >= {"projection", "to_k_ip"} else {}

    @classmethod
    def attach(cls, transformer: nn.Module, acting: Sequence[Acting], attention: ImageAttention) -> None:
        """On every double block."""
        for index, block in enumerate(transformer.transformer_blocks):
            _Block(index, block, acting)

    def act(self, embeds: torch.Tensor, timestep: torch.Tensor, weight: float) -> Acting:
        """The tokens of all pictures (B, N, width) side by side."""
        tokens = self.projection(embeds.flatten(0, 1))
        return Acting(self, weight, tokens.unflatten(0, embeds.shape[:2]).flatten(1, 2))

    def answer(self, index: int, query: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """What queries (B, heads, n, width) of a block get from the picture's tokens: (B, n, hidden)."""
        heads = query.shape[1]
        key, value = (heads_first(to[index](tokens), heads) for to in (self.to_k_ip, self.to_v_ip))
        return scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


class _Block:
    """Hooks on one double block, which do nothing in calls without a picture."""

    def __init__(self, index: int, block: nn.Module, acting: Sequence[Acting]):
        self._index, self._attention, self._acting = index, block.attn, acting
        self._sum = torch.empty(0)
        block.attn.to_q.register_forward_hook(self._ask)
        block.register_forward_hook(self._add)

    def _ask(self, _linear: nn.Module, _args: Any, query: torch.Tensor) -> None:
        if not self._acting:
            return
        attention = self._attention
        asked = attention.norm_q(query.unflatten(-1, (attention.heads, -1))).transpose(1, 2)
        self._sum = sum(
            acting.weight * acting.adapter.answer(self._index, asked, acting.tokens)
            for acting in self._acting
        )

    def _add(self, _block: nn.Module, _args: Any, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        if self._acting:
            output[1].add_(self._sum)
