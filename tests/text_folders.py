"""Tiny pipelines with the text encoders and tokenizers of xDiT's list, written as diffusers writes them."""

from __future__ import annotations

import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from tests.tiny import randomise

DEMO = Path(__file__).parent.parent / "assets" / "demo" / "pipeline"
LETTERS = string.ascii_letters + string.digits + ".,:;-&()'\""
WORDS = ("red", "circle", "small", "on", "the", "left")
LLAMA_SPECIAL = ("<|begin|>", "<|pad|>", "<|eot_id|>")
WIDTH, SIZES = 32, {"num_attention_heads": 4, "num_hidden_layers": 4, "intermediate_size": 64}


def t5_tokenizer() -> Any:
    """A Unigram vocabulary, as T5's."""
    pieces = [(p, 0.0) for p in ("<pad>", "</s>", "<unk>")] + [("▁", -3.0)]
    pieces += [(letter, -6.0) for letter in LETTERS] + [(f"▁{word}", -2.0) for word in WORDS]
    return transformers.T5Tokenizer(vocab=pieces, extra_ids=0)


def _t5_config(kind: type = transformers.T5Config) -> Any:
    return kind(
        vocab_size=128, d_model=WIDTH, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip


def bert_tokenizer() -> Any:
    """Words of letters, as BERT's."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    return transformers.BertTokenizer(vocab={piece: place for place, piece in enumerate(pieces)})


def gemma_tokenizer() -> Any:
    """Letters with a space before a word, as Gemma's; by itself it pads on the left."""
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", "\n", *LETTERS]
    vocabulary = {piece: place for place, piece in enumerate(pieces)}
    tokenizer = transformers.GemmaTokenizer(vocab=vocabulary, merges=[], add_bos_token=True)
    assert tokenizer("a").input_ids[0] == vocabulary["<bos>"]
    return tokenizer


def llama_tokenizer(folder: Path) -> Any:
    """Bytes, special tokens that stand in a text, and a token at the beginning, as Llama 3's.

    HunyuanVideo's instruction is as many tokens as with Llama 3's own vocabulary, which diffusers counts on.
    """
    told = DEFAULT_PROMPT_TEMPLATE
    before, _, _ = told["template"].partition("{}")
    count = told["crop_start"] - 1  # behind the token at the beginning
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: place for place, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in LLAMA_SPECIAL])
    behind = (n for n in range(len(before)) if len(backend.encode(before[n:]).ids) == count - 1)
    backend.add_tokens([AddedToken(before[: next(behind)], normalized=False)])  # the others are letters
    assert len(backend.encode(before, add_special_tokens=False).ids) == count
    first = LLAMA_SPECIAL[0]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{first} $A", special_tokens=[(first, backend.token_to_id(first))]
    )
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=first, pad_token=LLAMA_SPECIAL[1], padding_side="right"
    )
    made.save_pretrained(folder)
    return transformers.PreTrainedTokenizerFast.from_pretrained(folder)


def _decoder(kind: type, config: type, vocabulary: int, **more: Any) -> Any:
    return kind(
        config(
            vocab_size=vocabulary, hidden_size=WIDTH, num_key_value_heads=2, head_dim=8,
            max_position_embeddings=4096, **SIZES, **more,
        )
    )  # fmt: skip


def _t5(kind: str = "T5") -> dict[str, Any]:
    encoder = getattr(transformers, f"{kind}EncoderModel")(_t5_config(getattr(transformers, f"{kind}Config")))
    return {"tokenizer": t5_tokenizer(), "text_encoder": encoder}


def _hunyuan_dit(_root: Path) -> dict[str, Any]:
    second = {f"{name}_2": part for name, part in _t5().items()}
    config = transformers.BertConfig(vocab_size=256, hidden_size=WIDTH, **SIZES)
    first = {"tokenizer": bert_tokenizer(), "text_encoder": transformers.BertModel(config)}
    unused = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return first | second | unused


def _hunyuan_video(root: Path) -> dict[str, Any]:
    clip = transformers.CLIPTokenizer.from_pretrained(DEMO / "tokenizer")
    config = transformers.CLIPTextConfig(
        vocab_size=len(clip), hidden_size=WIDTH, max_position_embeddings=77, **SIZES,
        bos_token_id=clip.bos_token_id, eos_token_id=clip.eos_token_id, pad_token_id=clip.pad_token_id,
    )  # fmt: skip
    return {
        "tokenizer": llama_tokenizer(root / "llama"),
        "text_encoder": _decoder(transformers.LlamaModel, transformers.LlamaConfig, 512),
        "tokenizer_2": clip,
        "text_encoder_2": transformers.CLIPTextModel(config),
    }


def _sana(_root: Path) -> dict[str, Any]:
    more = {"query_pre_attn_scalar": 8, "sliding_window": 64}
    encoder = _decoder(transformers.Gemma2Model, transformers.Gemma2Config, 256, **more)
    return {"tokenizer": gemma_tokenizer(), "text_encoder": encoder}


# pipeline class -> its text encoders and tokenizers, and what else its __init__ asks for
PARTS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "PixArtAlphaPipeline": lambda _: _t5(),
    "PixArtSigmaPipeline": lambda _: _t5(),
    "LattePipeline": lambda _: _t5(),
    "CogVideoXPipeline": lambda _: _t5(),
    "ConsisIDPipeline": lambda _: _t5(),
    "MochiPipeline": lambda _: {**_t5(), "force_zeros_for_empty_prompt": True},
    "WanPipeline": lambda _: _t5("UMT5"),
    "HunyuanDiTPipeline": _hunyuan_dit,
    "HunyuanVideoPipeline": _hunyuan_video,
    "SanaPipeline": _sana,
}


# diffusers builds it with OpenCV only; it encodes prompts by a copy of the other's code.
ENCODES_AS = {"ConsisIDPipeline": "CogVideoXPipeline"}


def write(name: str, root: Path) -> tuple[Any, Path]:
    """A pipeline of this class, and the folder that diffusers wrote it into."""
    torch.manual_seed(0)
    parts = PARTS[name](root)
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            randomise(part, seed=1)
    cls = getattr(diffusers, ENCODES_AS.get(name, name))
    missing = {part: None for part in ("vae", "transformer", "scheduler")}
    pipeline = cls(**missing, **parts)
    pipeline.save_pretrained(root / name)
    index = root / name / "model_index.json"
    text = index.read_text().replace(cls.__name__, name)
    index.write_text(text.replace("TokenizersBackend", "LlamaTokenizerFast"))  # as HunyuanVideo's folder says
    return pipeline, root / name
