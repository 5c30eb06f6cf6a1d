"""Calls of tiny models that draw pictures, of classes that came after 0.8.0; and their sizes."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from worker.models.comfyui.cases import sizes
from worker.models.comfyui.cases.draw import PROMPT, SMALL, STILL, THOUSANDS, Case, Draw
from worker.models.comfyui.cases.sizes import CHANNELS, TEXT, Size

LATENTS = 128  # channels of a FLUX.2 latent
LAYERS = 3  # of the text encoder, of which a prompt's tokens hold the outputs
MAGE_TEXT = 2560  # ComfyUI tells this one by the width of its prompts
ROTATED: Size = {"axes_dims_rope": [8, 12, 12]}

ERNIE: Size = {
    "hidden_size": 64, "num_attention_heads": 2, "num_layers": 2, "ffn_hidden_size": 96,
    "in_channels": LATENTS, "out_channels": LATENTS, "text_in_dim": TEXT, "rope_axes_dim": [8, 12, 12],
}  # fmt: skip
ADAPTER: Size = {"source_dim": TEXT, "target_dim": TEXT, "model_dim": 32, "num_layers": 2, "num_heads": 2}
KREA2: Size = {
    "features": 64, "heads": 2, "kvheads": 1, "layers": 2, "channels": CHANNELS, "txtdim": TEXT,
    "txtlayers": LAYERS, "txtheads": 2, "txtkvheads": 1,
}  # fmt: skip
IDEOGRAM4: Size = {
    "in_channels": LATENTS, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 32,
    "intermediate_size": 96, "adaln_dim": 48, "llm_features_dim": TEXT, "mrope_section": [6, 5, 5],
}  # fmt: skip
LENS: Size = ROTATED | {
    "in_channels": LATENTS, "out_channels": LATENTS // 4, "num_layers": 2, "attention_head_dim": 32,
    "num_attention_heads": 2, "enc_hidden_dim": TEXT, "selected_layer_index": list(range(LAYERS)),
}  # fmt: skip
LENS_ONE_LAYER: Size = LENS | {"multi_layer_encoder_feature": False, "selected_layer_index": [0]}
MAGE_FLOW: Size = ROTATED | {
    "in_channels": LATENTS, "out_channels": LATENTS, "num_layers": 2, "attention_head_dim": 32,
    "num_attention_heads": 2, "joint_attention_dim": MAGE_TEXT,
}  # fmt: skip
BOOGU: Size = {
    "in_channels": CHANNELS, "hidden_size": 64, "num_layers": 2, "num_double_stream_layers": 2,
    "num_refiner_layers": 1, "num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 32,
    "axes_dim_rope": [8, 12, 12], "instruction_feat_dim": TEXT,
}  # fmt: skip
JOYIMAGE: Size = {
    "in_channels": CHANNELS, "hidden_size": 64, "num_attention_heads": 2, "text_dim": TEXT, "num_layers": 2,
    "rope_dim_list": [8, 12, 12],
}  # fmt: skip


def _ernie(d: Draw) -> Any:
    return (d(LATENTS, *SMALL), d.time(THOUSANDS), d.prompt()), {}


def _anima(d: Draw, **more: Any) -> Any:
    return (d(CHANNELS, 1, *STILL), d.time(), d.prompt()), more


def _anima_ids(d: Draw) -> Any:
    """As it is called outside of inference, with what the prompt's adapter is given."""
    ids = torch.arange(9).repeat(d.batch, 1)
    return _anima(d, t5xxl_ids=ids, t5xxl_weights=d(9, 1).sigmoid())


def _krea2(d: Draw, size: tuple[int, int] = STILL, **more: Any) -> Any:
    return (d(CHANNELS, 1, *size), d.time(), d.prompt(LAYERS * TEXT)), more


def _krea2_edit(d: Draw, method: str) -> Any:
    references = [d(CHANNELS, 1, 6, 10), d(CHANNELS, 1, 4, 6)]
    return _krea2(d, ref_latents=references, ref_latents_method=method)


def _ideogram4(d: Draw, **more: Any) -> Any:
    return (d(LATENTS, *SMALL), d.time(), d.prompt()), more


def _lens(d: Draw, layers: int = LAYERS, **more: Any) -> Any:
    return (d(LATENTS, *SMALL), d.time(), d.prompt(layers * TEXT)), more


def _mage_flow(d: Draw, **more: Any) -> Any:
    return (d(LATENTS, *SMALL), d.time().bfloat16(), d.prompt(MAGE_TEXT)), more


def _boogu(d: Draw, **more: Any) -> Any:
    return (d(CHANNELS, *STILL), d.time(), d.prompt(), PROMPT), more


def _joyimage(d: Draw, **more: Any) -> Any:
    return (d(CHANNELS, 1, *STILL), d.time(THOUSANDS), d.prompt()), more


_ANIMA, _KREA2 = ("anima.model", "Anima"), ("krea2.model", "SingleStreamDiT")
_IDEOGRAM4, _LENS = (
    ("ideogram4.model", "Ideogram4Transformer2DModel"),
    ("lens.model", "LensTransformer2DModel"),
)
_MAGE, _BOOGU = ("mage_flow.model", "MageFlowTransformer2DModel"), ("boogu.model", "BooguTransformer2DModel")
_JOY = ("joyimage.model", "JoyImageTransformer3DModel")
_ADAPTED = {"LLMAdapter": ADAPTER}

CASES: dict[str, Case] = {
    "ernie image": Case("ernie.model", "ErnieImageModel", ERNIE, _ernie),
    "anima": Case(*_ANIMA, sizes.COSMOS2, _anima, parts=_ADAPTED),
    "anima ids": Case(*_ANIMA, sizes.COSMOS2, _anima_ids, parts=_ADAPTED),
    "krea2": Case(*_KREA2, KREA2, partial(_krea2, size=(9, 13))),
    "krea2 edit": Case(*_KREA2, KREA2, partial(_krea2_edit, method="index")),
    "krea2 edit zero": Case(*_KREA2, KREA2, partial(_krea2_edit, method="index_timestep_zero")),
    "ideogram4": Case(*_IDEOGRAM4, IDEOGRAM4, _ideogram4),
    "ideogram4 mask": Case(*_IDEOGRAM4, IDEOGRAM4, lambda d: _ideogram4(d, attention_mask=d.mask())),
    "ideogram4 unprompted": Case(
        *_IDEOGRAM4, IDEOGRAM4, lambda d: ((d(LATENTS, *SMALL), d.time()), {"context": None})
    ),
    "lens": Case(*_LENS, LENS, lambda d: _lens(d, control=d.residuals(2, 0))),
    "lens mask": Case(*_LENS, LENS, lambda d: _lens(d, attention_mask=d.mask())),
    "lens one layer": Case(*_LENS, LENS_ONE_LAYER, partial(_lens, layers=1)),
    "mage flow": Case(*_MAGE, MAGE_FLOW, lambda d: _mage_flow(d, control=d.residuals(2, 0))),
    "mage flow edit": Case(
        *_MAGE,
        MAGE_FLOW,
        lambda d: _mage_flow(d, ref_latents=[d(LATENTS, *SMALL), d(LATENTS, 3, 5)], attention_mask=d.mask()),
    ),
    "boogu": Case(*_BOOGU, BOOGU, _boogu),
    "boogu edit": Case(
        *_BOOGU, BOOGU, lambda d: _boogu(d, ref_latents=[d(CHANNELS, 6, 10), d(CHANNELS, 4, 6)])
    ),
    "joyimage": Case(*_JOY, JOYIMAGE, _joyimage),
    "joyimage edit": Case(
        *_JOY, JOYIMAGE, lambda d: _joyimage(d, ref_latents=[d(CHANNELS, 1, 6, 10), d(CHANNELS, 1, 5, 7)])
    ),
}
