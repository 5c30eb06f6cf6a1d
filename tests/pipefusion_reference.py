"""PipeFusion in one process and in plain words: what stale keys and values make of a run.

Blocks are diffusers', the attention is this file's, nothing is the engine's. Patches are computed one after
another, step after step, which is the order every stage of a pipeline meets them in.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import nn
from torch.nn.functional import scaled_dot_product_attention


class StaleAttention:
    """Keys and values of all image tokens and of the text; a call renews those it brings."""

    def __init__(self, owner: StaleTransformer):
        self._owner = owner
        self._kept: dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: None = None,
        image_rotary_emb: Any = None,
        **_: Any,
    ) -> Any:
        owner, own_text, text = self._owner, 0, None
        if encoder_hidden_states is not None:
            names = ("add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k")
            text, own_text = _heads(attn, encoder_hidden_states, names), encoder_hidden_states.shape[1]
        image = _heads(attn, hidden_states, ("to_q", "to_k", "to_v", "norm_q", "norm_k"))
        if text is not None:  # text before image, in any order that the tables have too
            query, key, value = (torch.cat(pair, 2) for pair in zip(text, image, strict=True))
        else:
            query, key, value = image
            own_text = owner.text_in_single if image_rotary_emb is not None else 0
        if image_rotary_emb is not None:
            query, key = (apply_rotary_emb(part, image_rotary_emb) for part in (query, key))
        key, value = self._renew(key, own_text), self._renew(value, own_text, "v")
        out = scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        if encoder_hidden_states is None:
            return attn.to_out[0](out) if getattr(attn, "to_out", None) is not None else out
        out_text, out_image = out[:, :own_text], attn.to_out[0](out[:, own_text:])
        if attn.context_pre_only:
            return out_image, out_text
        return out_image, attn.to_add_out(out_text)

    def _renew(self, new: torch.Tensor, own_text: int, what: str = "k") -> torch.Tensor:
        start, stop = self._owner.span
        text, image = new[:, :, :own_text], new[:, :, own_text:]
        name = (self._owner.row, what)
        if self._owner.whole:
            self._kept[name] = (text.clone(), image.clone())
        else:
            kept_text, kept_image = self._kept[name]
            kept_image[:, :, start:stop] = image
            if own_text:
                kept_text.copy_(text)
        return torch.cat(self._kept[name], 2)


class StaleTransformer:
    """A diffusers SD3 or Flux transformer that may be given some image tokens only.

    Args:
        call: the transformer's keyword arguments for one row, by row.
    """

    def __init__(self, module: nn.Module, calls: dict[int, dict[str, Any]]):
        self.module, self.calls = copy.deepcopy(module), calls
        self.row, self.span, self.whole, self.text_in_single = 0, (0, 0), True, 0
        for part in self.module.modules():
            if hasattr(part, "processor"):
                part.processor = StaleAttention(self)

    def tokens(self, row: int, x: torch.Tensor, t: torch.Tensor, span: tuple[int, int], whole: bool):
        """Output (1, tokens, channels * 4) of the tokens of `span`, as (row, column, channel) of each."""
        self.row, self.span, self.whole = row, span, whole
        given = self.calls[row]
        flux = "img_ids" in given
        return (self._flux if flux else self._sd3)(given, x, t, slice(*span), span[0] == 0)

    def _sd3(self, given: dict, x: torch.Tensor, t: torch.Tensor, span: slice, with_text: bool):
        module = self.module
        time = module.time_text_embed(t, given["pooled_projections"])
        image = module.pos_embed(x)[:, span]
        text = module.context_embedder(given["encoder_hidden_states"])
        for block in module.transformer_blocks:
            if with_text:
                text, image = block(hidden_states=image, encoder_hidden_states=text, temb=time)
            else:
                image = _image_alone(block, image, text, time)
        out = module.proj_out(module.norm_out(image, time))
        return out.unflatten(-1, (2, 2, -1)).permute(0, 1, 4, 2, 3).flatten(2)

    def _flux(self, given: dict, x: torch.Tensor, t: torch.Tensor, span: slice, with_text: bool):
        module = self.module
        guidance = given["guidance"] * 1000
        time = module.time_text_embed(t * 1000, guidance, given["pooled_projections"])
        image, text = module.x_embedder(_packed(x)[:, span]), given["encoder_hidden_states"]
        text = module.context_embedder(text if with_text else text[:, :0])
        ids = torch.cat([given["txt_ids"][: text.shape[1]], given["img_ids"][span]])
        tables, self.text_in_single = module.pos_embed(ids), text.shape[1]
        for block in (*module.transformer_blocks, *module.single_transformer_blocks):
            text, image = block(
                hidden_states=image, encoder_hidden_states=text, temb=time, image_rotary_emb=tables
            )
        return module.proj_out(module.norm_out(image, time))


def _image_alone(block: nn.Module, image: torch.Tensor, text: torch.Tensor, time: torch.Tensor):
    """What a JointTransformerBlock does to the image when the text's keys and values are kept."""
    norm, gate, shift, scale, gate_mlp, *dual = block.norm1(image, emb=time)
    out, _ = block.attn(hidden_states=norm, encoder_hidden_states=text[:, :0])
    image = image + gate.unsqueeze(1) * out
    if dual:
        image = image + dual[1].unsqueeze(1) * block.attn2(hidden_states=dual[0])
    norm = block.norm2(image) * (1 + scale[:, None]) + shift[:, None]
    return image + gate_mlp.unsqueeze(1) * block.ff(norm)


def _heads(attn: nn.Module, tokens: torch.Tensor, names: tuple[str, ...]) -> list[torch.Tensor]:
    """Query, key and value (B, heads, tokens, width)."""
    parts = [getattr(attn, name)(tokens).unflatten(-1, (attn.heads, -1)) for name in names[:3]]
    for i, name in enumerate(names[3:]):
        if getattr(attn, name, None) is not None:
            parts[i] = getattr(attn, name)(parts[i])
    return [part.transpose(1, 2) for part in parts]


def _packed(x: torch.Tensor) -> torch.Tensor:
    patches = x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # B, C, h, 2, w, 2
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def _unpacked(tokens: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    patches = tokens.unflatten(1, (shape[2] // 2, -1)).unflatten(3, (-1, 2, 2))
    return patches.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def euler_run(
    transformer: StaleTransformer,
    noise: torch.Tensor,
    sigmas: torch.Tensor,
    timesteps: torch.Tensor,
    spans: list[tuple[int, int]],
    warmup: int,
    cfg: float | None = None,
) -> torch.Tensor:
    """Euler from noise of whole patches, (1, C, H, W). Row 0 is the prompt, row 1 the negative one.

    Args:
        spans: image tokens of each patch. cfg: None is no guidance.
    """
    x = noise.clone()
    for i in range(len(sigmas) - 1):
        everything = (0, spans[-1][1])
        for span in [everything] if i < warmup else spans:
            t = timesteps[i].expand(1)
            out = transformer.tokens(0, x, t, span, i < warmup)
            if cfg is not None:
                without = transformer.tokens(1, x, t, span, i < warmup)
                out = without + cfg * (out - without)
            tokens = _packed(x).clone()
            tokens[:, slice(*span)] += (sigmas[i + 1] - sigmas[i]) * out
            x = _unpacked(tokens, noise.shape)
    return x
