"""IP-Adapters of Stable Diffusion 3 / 3.5 in InstantX' format, as diffusers computes them.

In every attention the image tokens, normalised anew, attend a second time: to themselves and to the
picture's tokens together. The answer is added before the output projection. Where tokens are spread over
ranks, that attention is spread like the model's own, and every rank adds the picture's tokens for its heads.
Source: diffusers' SD3IPAdapterJointAttnProcessor2_0, IPAdapterTimeImageProjection and
loaders/transformer_sd3.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn

from worker.checkpoints import Shapes
from worker.models.ip_adapter import Acting, ImageAttention, IPAdapter, count, heads_first

RESAMPLER_HEAD_DIM = 64
_LAYER = re.compile(r"layers\.(\d+)\.(.+)\.(weight|bias)")
# InstantX' names within a layer of the resampler: diffusers'.
_LAYER_PARTS = {
    "0.norm1": "ln0",
    "0.norm2": "ln1",
    "0.to_q": "attn.to_q",
    "0.to_kv": "attn.to_kv",
    "0.to_out": "attn.to_out.0",
    "1.0": "adaln_norm",
    "1.1": "ff.net.0.proj",
    "1.3": "ff.net.2",
    "2.1": "adaln_proj",
}
_QUERY_KEY_VALUE = ("to_q", "to_k", "to_v")


class SD3IPAdapter(IPAdapter):
    """A picture's tokens, which depend on the time, and what each attention makes of them."""

    takes: ClassVar[str] = "penultimate_hidden_states"
    encoder: ClassVar[str] = "siglip-so400m-patch14-384"
    most_pictures: ClassVar[int] = 1

    def __init__(self, shapes: Shapes, config: dict[str, Any]):
        from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
        from diffusers.models.embeddings import IPAdapterTimeImageProjection

        super().__init__()
        inner, self.width = shapes["projection.proj_in.weight"]
        head_dim = config["attention_head_dim"]
        hidden = config["num_attention_heads"] * head_dim
        self.projection = IPAdapterTimeImageProjection(
            embed_dim=self.width,
            output_dim=hidden,
            hidden_dim=inner,
            depth=count(shapes, "projection.layers."),
            dim_head=RESAMPLER_HEAD_DIM,
            heads=shapes["projection.layers.0.attn.to_q.weight"][0] // RESAMPLER_HEAD_DIM,
            num_queries=shapes["projection.latents"][1],
            timestep_in_dim=shapes["projection.time_embedding.linear_1.weight"][1],
        )
        self.places = config["num_layers"] + len(config["dual_attention_layers"])
        self.attentions = nn.ModuleList(
            SD3IPAdapterJointAttnProcessor2_0(hidden, hidden, head_dim, inner) for _ in range(self.places)
        )

    @classmethod
    def sources(cls, names: Iterable[str]) -> dict[str, str]:
        """InstantX' names, or diffusers' of the resampler."""
        found = {}
        for name in names:
            group, _, path = name.partition(".")
            if group == "image_proj":
                layer = _LAYER.fullmatch(path)
                if layer is not None:
                    number, part, kind = layer.groups()
                    path = f"layers.{number}.{_LAYER_PARTS.get(part, part)}.{kind}"
                found[f"projection.{path}"] = name
            elif group == "ip_adapter":
                found[f"attentions.{path}"] = name
        return found if "projection.latents" in found else {}

    @classmethod
    def attach(cls, transformer: nn.Module, acting: Sequence[Acting], attention: ImageAttention) -> None:
        """On every attention, in the order in which the file numbers them."""
        attentions = [a for block in transformer.transformer_blocks for a in (block.attn, block.attn2) if a]
        for index, module in enumerate(attentions):
            _Attention(index, module, acting, attention)

    def act(self, embeds: torch.Tensor, timestep: torch.Tensor, weight: float) -> Acting:
        """The tokens of the one picture (B, 1, tokens, width) at this time."""
        tokens, time = self.projection(embeds.squeeze(1), timestep)
        return Acting(self, weight, tokens, time)

    def answer(
        self, index: int, streams: list[torch.Tensor], acting: Acting, attention: ImageAttention
    ) -> torch.Tensor:
        """What the image tokens of an attention get: (B, n, hidden).

        Args:
            streams: query, key and value of the image tokens, (B, heads, n, width), not normalised.
        """
        layer, (query, key, value) = self.attentions[index], streams
        heads, tokens = query.shape[1], self.attentions[index].norm_ip(acting.tokens, temb=acting.time)
        more_key, more_value = (heads_first(to(tokens), heads) for to in (layer.to_k_ip, layer.to_v_ip))
        answer = attention(
            layer.norm_q(query), layer.norm_k(key), value, layer.norm_ip_k(more_key), more_value
        )
        return answer.transpose(1, 2).flatten(2).to(query.dtype)


class _Attention:
    """Hooks on one attention, which do nothing in calls without a picture."""

    def __init__(self, index: int, module: nn.Module, acting: Sequence[Acting], attention: ImageAttention):
        self._index, self._heads, self._acting, self._attention = index, module.heads, acting, attention
        self._seen: dict[str, torch.Tensor] = {}
        for name in _QUERY_KEY_VALUE:
            getattr(module, name).register_forward_hook(partial(self._keep, name))
        module.to_out[0].register_forward_pre_hook(self._add)

    def _keep(self, name: str, _linear: nn.Module, _args: Any, output: torch.Tensor) -> None:
        if self._acting:
            self._seen[name] = output

    def _add(self, _linear: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor] | None:
        if not self._acting:
            return None
        streams = [heads_first(self._seen.pop(name), self._heads) for name in _QUERY_KEY_VALUE]
        image = args[0]
        for acting in self._acting:
            answer = acting.adapter.answer(self._index, streams, acting, self._attention)
            image = image + acting.weight * answer
        return (image,)
