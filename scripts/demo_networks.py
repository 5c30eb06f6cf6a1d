"""The demo model's parts apart from its autoencoder: tokenizer, two text encoders, transformer.

All are the stock classes of Stable Diffusion 3 at toy sizes, so that every program
which reads that family's folders or files reads these too.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import torch
from demo_pictures import COLOURS, PICTURE_SIZE, POSITIONS, SHAPES, SIZES
from demo_vae import LATENT_CHANNELS
from diffusers import SD3Transformer2DModel
from tokenizers import pre_tokenizers
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

TEXT_LENGTH = 16
_TEXT_WIDTH = 64
_HEADS, _HEAD_WIDTH, _LAYERS = 2, 64, 2
_WIDTH = _HEADS * _HEAD_WIDTH
_BOS, _EOS = "<|startoftext|>", "<|endoftext|>"
# People write these too. They are not trained: they get the embedding of the word they stand for.
SYNONYMS = {
    "center": "centre",
    "middle": "centre",
    "big": "large",
    "little": "small",
    "violet": "purple",
    "disc": "circle",
    "upon": "on",
}


def trained_words() -> list[str]:
    phrases = [*COLOURS, *SHAPES, *SIZES, *POSITIONS, "a", "an", "background", ","]
    return sorted({word for phrase in phrases for word in phrase.split()})


def _byte_pair_merges(words: list[str]) -> list[tuple[str, str]]:
    """Merges that make each word one token, commonest pair first.

    tokenizers' own trainer breaks ties differently in every run, which would make the
    whole training run unrepeatable.
    """
    spellings = [(*word[:-1], word[-1] + "</w>") for word in words]
    merges = []
    while any(len(spelling) > 1 for spelling in spellings):
        pairs = Counter(pair for spelling in spellings for pair in pairwise(spelling))
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        spellings = [_merged(spelling, best) for spelling in spellings]
    return merges


def _merged(spelling: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    result: list[str] = []
    for symbol in spelling:
        if result and (result[-1], symbol) == pair:
            result[-1] += symbol
        else:
            result.append(symbol)
    return tuple(result)


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer in which each known word is one token; others are spelt in bytes."""
    merges = _byte_pair_merges(sorted({*trained_words(), *SYNONYMS}))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    entries = [_BOS, _EOS, *letters, *(letter + "</w>" for letter in letters)]
    entries += [left + right for left, right in merges]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(entries))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TEXT_LENGTH)


def build_text_encoder(vocabulary_size: int, activation: str) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=vocabulary_size,
        hidden_size=_TEXT_WIDTH,
        projection_dim=_TEXT_WIDTH,
        intermediate_size=2 * _TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TEXT_LENGTH,
        hidden_act=activation,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return CLIPTextModelWithProjection(config)


@torch.no_grad()
def settle_vocabulary(encoder: CLIPTextModelWithProjection, tokenizer: CLIPTokenizer) -> None:
    """Give synonyms their word's embedding and silence the tokens that training never saw."""
    table = encoder.text_model.embeddings.token_embedding.weight
    index = tokenizer.get_vocab()
    seen = [index[_BOS], index[_EOS], *(index[f"{word}</w>"] for word in trained_words())]
    unseen = torch.ones(len(table), dtype=torch.bool)
    unseen[seen] = False
    table[unseen] = 0
    for synonym, word in SYNONYMS.items():
        table[index[f"{synonym}</w>"]] = table[index[f"{word}</w>"]]


def build_transformer() -> SD3Transformer2DModel:
    """A two-block MMDiT which starts as the identity, as the published ones did."""
    transformer = SD3Transformer2DModel(
        sample_size=PICTURE_SIZE // 8,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=_LAYERS,
        num_attention_heads=_HEADS,
        attention_head_dim=_HEAD_WIDTH,
        joint_attention_dim=2 * _TEXT_WIDTH,
        caption_projection_dim=_WIDTH,
        pooled_projection_dim=2 * _TEXT_WIDTH,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )
    modulations = [transformer.norm_out.linear, transformer.proj_out]
    for block in transformer.transformer_blocks:
        modulations += [block.norm1.linear, block.norm1_context.linear]
    for linear in modulations:  # diffusers leaves these at random
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    return transformer


def _swapped(tensor: torch.Tensor) -> torch.Tensor:
    """Stability stores (shift, scale) where diffusers stores (scale, shift)."""
    return torch.cat(tensor.chunk(2)[::-1])


_TOP_LEVEL = {
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "proj_out": "final_layer.linear",
}
# Per stream: the diffusers names of query, key, value, their norms, output, norm, MLP.
_STREAMS = {
    "x_block": ("to_q", "to_k", "to_v", "norm_q", "norm_k", "to_out.0", "norm1", "ff"),
    "context_block": (
        *("add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k"),
        *("to_add_out", "norm1_context", "ff_context"),
    ),
}


def _stream_state(
    state: dict[str, torch.Tensor], block: str, stream: str, last: bool
) -> dict[str, torch.Tensor]:
    """One block's picture or text stream under its names in joint_blocks.N.<stream>."""
    query, key, value, query_norm, key_norm, output, norm, mlp = _STREAMS[stream]
    result = {
        "attn.ln_q.weight": state[f"{block}.attn.{query_norm}.weight"],
        "attn.ln_k.weight": state[f"{block}.attn.{key_norm}.weight"],
    }
    # The last block only reads the text: it has no text output and no text MLP.
    reads_only = last and stream == "context_block"
    for kind in ("weight", "bias"):
        parts = [state[f"{block}.attn.{name}.{kind}"] for name in (query, key, value)]
        result[f"attn.qkv.{kind}"] = torch.cat(parts)
        modulation = state[f"{block}.{norm}.linear.{kind}"]
        result[f"adaLN_modulation.1.{kind}"] = _swapped(modulation) if reads_only else modulation
        if not reads_only:
            result[f"attn.proj.{kind}"] = state[f"{block}.attn.{output}.{kind}"]
            result[f"mlp.fc1.{kind}"] = state[f"{block}.{mlp}.net.0.proj.{kind}"]
            result[f"mlp.fc2.{kind}"] = state[f"{block}.{mlp}.net.2.{kind}"]
    return result


def single_file_state(transformer: SD3Transformer2DModel) -> dict[str, torch.Tensor]:
    """The transformer's weights under Stability's names, as ComfyUI's UNETLoader expects them."""
    state = transformer.state_dict()
    result = {"pos_embed": state["pos_embed.pos_embed"]}
    for kind in ("weight", "bias"):
        for ours, theirs in _TOP_LEVEL.items():
            result[f"{theirs}.{kind}"] = state[f"{ours}.{kind}"]
        final = _swapped(state[f"norm_out.linear.{kind}"])
        result[f"final_layer.adaLN_modulation.1.{kind}"] = final
    count = len(transformer.transformer_blocks)
    for index in range(count):
        for stream in _STREAMS:
            block = f"transformer_blocks.{index}"
            weights = _stream_state(state, block, stream, last=index == count - 1)
            for name, tensor in weights.items():
                result[f"joint_blocks.{index}.{stream}.{name}"] = tensor
    return {f"model.diffusion_model.{n}": t.contiguous() for n, t in result.items()}
