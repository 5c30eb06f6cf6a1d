"""How diffusers' pipelines encode a prompt: which encoders, how long, what of them goes where.

Names of encoders and options are ComfyUI's, so that stock nodes find what they ask for. Lengths, masks and
layers are those of each pipeline's `encode_prompt`, called as its `__call__` does by default.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto

CONTEXT = "cond"  # the first tensor of a CONDITIONING
MASK = "attention_mask"

CLIP = ("CLIPTextModel", "CLIPTextModelWithProjection")
T5 = ("T5EncoderModel",)


class Longer(Enum):
    """What becomes of a prompt that is longer than an encoder's length."""

    IN_ROWS = auto()  # of that length, one behind the other, as ComfyUI does with a CLIP
    AS_IT_IS = auto()  # one longer row, as ComfyUI does with a T5
    LEFT_OUT = auto()  # as diffusers does; and it is said


class Padding(Enum):
    """What becomes of the padding's hidden states."""

    KEPT = auto()
    ZEROED = auto()
    LEFT_OUT = auto()  # where diffusers masks it in a cross-attention, and ComfyUI has no such mask


@dataclass(frozen=True)
class Template:
    """An instruction around a prompt.

    Args:
        before, after: the texts around it.
        start, dropped: hidden states that are left out again: the first one's place, and how many. None for
            how many: the instruction's but the first `start` and the last one.
        for_empty: whether an empty prompt gets it too.
    """

    before: str
    after: str = ""
    start: int = 0
    dropped: int | None = None
    for_empty: bool = True


@dataclass(frozen=True)
class EncoderRule:
    """What a pipeline does with one of its text encoders.

    Args:
        name: ComfyUI's name of the encoder.
        suffix: of its folders, text_encoder and tokenizer.
        classes: of transformers, one of which it is.
        length: tokens that a prompt is filled up to; None: as many as the encoder has places for.
        longer: what becomes of more.
        hidden: which hidden state is taken; None is the last one, normalised.
        masked: padding is not attended to within the encoder.
        padding: what becomes of its hidden states.
        context: the entry of the CONDITIONING that the hidden states are; "" is none.
        beside: they are laid beside those of other such encoders, and filled up to the transformer's width.
        mask: the entry that says which tokens are no padding; "" is none.
        pooled: its pooled output is one.
        clean: what is done to the text before.
        template: makes the instruction around the prompt, of diffusers' own words.
        blank: the pipeline's flag by which an empty prompt is all zeros; "" is none.
        optional: a folder may lack it.
    """

    name: str
    suffix: str = ""
    classes: tuple[str, ...] = T5
    length: int | None = None
    longer: Longer = Longer.LEFT_OUT
    hidden: int | None = None
    masked: bool = True
    padding: Padding = Padding.KEPT
    context: str = CONTEXT
    beside: bool = False
    mask: str = ""
    pooled: bool = False
    clean: Callable[[str], str] | None = None
    template: Callable[[], Template] | None = None
    blank: str = ""
    optional: bool = False


def _lowered(text: str) -> str:
    return text.lower().strip()


def _unescaped(text: str) -> str:
    """Wan's: HTML entities and runs of spaces, and what ftfy mends where it is installed."""
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    return prompt_clean(text)


def _video_instruction() -> Template:
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE as told

    before, _, after = told["template"].partition("{}")
    return Template(before, after, dropped=told["crop_start"])


def _human_instruction() -> Template:
    """SANA's. diffusers has none around a negative prompt, of which only an empty one is known for sure."""
    from diffusers import SanaPipeline

    told = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    return Template("\n".join(told), start=1, for_empty=False)


def _comfyui_clip(name: str, suffix: str, **more: object) -> EncoderRule:
    return EncoderRule(name, suffix, CLIP, longer=Longer.IN_ROWS, masked=False, pooled=True, **more)


def _comfyui_t5(suffix: str, length: int, **more: object) -> EncoderRule:
    return EncoderRule("t5xxl", suffix, length=length, longer=Longer.AS_IT_IS, masked=False, **more)


def _caption_t5(length: int) -> EncoderRule:
    return EncoderRule("t5xxl", length=length, padding=Padding.LEFT_OUT, clean=_lowered)


Rules = tuple[EncoderRule, ...]
_SD3: Rules = (
    _comfyui_clip("l", "", hidden=-2, beside=True),
    _comfyui_clip("g", "_2", hidden=-2, beside=True),
    _comfyui_t5("_3", 77, optional=True),
)
_FLUX: Rules = (_comfyui_clip("l", "", context=""), _comfyui_t5("_2", 256))
_HUNYUAN_DIT: Rules = (
    EncoderRule("hydit_clip", "", ("BertModel",), 77, mask=MASK),
    EncoderRule(
        "mt5xl", "_2", (*T5, "MT5EncoderModel"), 256,
        context="conditioning_mt5xl", mask="attention_mask_mt5xl",
    ),
)  # fmt: skip
_COGVIDEOX: Rules = (EncoderRule("t5xxl", length=226, masked=False),)
_MOCHI: Rules = (EncoderRule("t5xxl", length=256, mask=MASK, blank="force_zeros_for_empty_prompt"),)
_SANA: Rules = (
    EncoderRule(
        "gemma2_2b", "", ("Gemma2Model",), 300,
        padding=Padding.LEFT_OUT, clean=_lowered, template=_human_instruction,
    ),
)  # fmt: skip
_HUNYUAN_VIDEO: Rules = (
    EncoderRule("llama", "", ("LlamaModel",), 256, hidden=-3, mask=MASK, template=_video_instruction),
    EncoderRule("l", "_2", CLIP, 77, masked=False, context="", pooled=True),
)
_WAN: Rules = (
    EncoderRule("umt5xxl", "", ("UMT5EncoderModel",), 512, padding=Padding.ZEROED, clean=_unescaped),
)

# Every pipeline whose folder has text encoders for the ranks; () has none: it knows labels, no prompts.
PIPELINES: dict[str, Rules] = {
    "StableDiffusion3Pipeline": _SD3,
    "FluxPipeline": _FLUX,
    "FluxFillPipeline": _FLUX,
    "FluxKontextPipeline": _FLUX,
    "FluxControlPipeline": _FLUX,
    "PixArtAlphaPipeline": (_caption_t5(120),),
    "PixArtSigmaPipeline": (_caption_t5(300),),
    "LattePipeline": (_caption_t5(120),),
    "HunyuanDiTPipeline": _HUNYUAN_DIT,
    "CogVideoXPipeline": _COGVIDEOX,
    "CogVideoXImageToVideoPipeline": _COGVIDEOX,
    "CogVideoXVideoToVideoPipeline": _COGVIDEOX,
    "ConsisIDPipeline": _COGVIDEOX,
    "MochiPipeline": _MOCHI,
    "SanaPipeline": _SANA,
    "HunyuanVideoPipeline": _HUNYUAN_VIDEO,
    "WanPipeline": _WAN,
    "WanImageToVideoPipeline": _WAN,
    "WanVideoToVideoPipeline": _WAN,
    "WanVACEPipeline": _WAN,
    "DiTPipeline": (),
}
