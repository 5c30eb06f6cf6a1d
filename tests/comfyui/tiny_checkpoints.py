"""Tiny random checkpoints in the real format: a diffusion model, text encoders and a VAE in one file.

Widths are a fraction of the published ones; names, prefixes and what ComfyUI tells a model by are theirs.
"""

from __future__ import annotations

import functools
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.comfyui.inputs import SHIM

Tensors = dict[str, torch.Tensor]
MODEL = "model.diffusion_model."  # before the names of the diffusion model
# Of every text encoder. Their tokens are the real ones, and so is how many there are.
CLIP = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 3,
        "projection_dim": 64}  # fmt: skip
WIDTH, OTHER_POOLED, EMBEDDED = 64, 1280, 6 * 256  # of a CLIP; of one that SD3 lacks; sizes that SDXL is told
UNET: dict[str, Any] = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "legacy": False,
    "use_spatial_transformer": True, "use_temporal_resblock": False, "use_temporal_attention": False,
}  # fmt: skip
ONE_EACH = {"num_res_blocks": [1, 1], "channel_mult": [1, 2], "transformer_depth": [1, 1],
            "transformer_depth_output": [1, 1, 1, 1], "transformer_depth_middle": 1}  # fmt: skip


@dataclass(frozen=True)
class TinyCheckpoint:
    """What a file holds.

    Args:
        family: ComfyUI's name of the configuration.
        place: module and name of the diffusion model's class.
        size: what that class is built with, and what of it a file has to say, by name.
        published: what ComfyUI knows the configuration by.
        channels: of a latent.
        clip: it holds text encoders.
        more: tensors beside all these.
    """

    family: str
    size: dict[str, Any]
    said: tuple[str, ...] = ()
    published: dict[str, Any] = field(default_factory=dict)
    place: tuple[str, str] = ("comfy.ldm.modules.diffusionmodules.openaimodel", "UNetModel")
    channels: int = 4
    clip: bool = True
    more: Callable[[], Tensors] = dict


SD15 = TinyCheckpoint(
    "SD15",
    UNET | ONE_EACH | {"context_dim": WIDTH, "num_heads": 8, "use_linear_in_transformer": False},
    ("model_channels", "context_dim"),
    {"model_channels": 320, "context_dim": 768},
)
# Twelve blocks out, as the layer has whose norm tells what it predicts.
SD2 = TinyCheckpoint(
    "SD20",
    UNET
    | {
        "num_res_blocks": [2, 2, 2, 2], "channel_mult": [1, 1, 1, 1], "transformer_depth": [1] * 8,
        "transformer_depth_output": [1] * 12, "transformer_depth_middle": 1, "context_dim": WIDTH,
        "num_head_channels": 16, "use_linear_in_transformer": True,
    },
    ("model_channels", "context_dim", "num_head_channels"),
    {"model_channels": 320, "context_dim": 1024},
    clip=False,
)  # fmt: skip
# Its rows are the frames of a video, which see each other.
SVD = TinyCheckpoint(
    "SVD_img2vid",
    UNET
    | ONE_EACH
    | {
        "in_channels": 8, "context_dim": WIDTH, "num_head_channels": 16, "use_linear_in_transformer": True,
        "num_classes": "sequential", "adm_in_channels": EMBEDDED // 2, "use_temporal_resblock": True,
        "use_temporal_attention": True, "extra_ff_mix_layer": True, "use_spatial_context": True,
        "merge_strategy": "learned_with_images", "merge_factor": 0.0, "video_kernel_size": [3, 1, 1],
        "disable_temporal_crossattention": False,
    },
    ("model_channels", "context_dim", "num_head_channels", "transformer_depth"),
    {"model_channels": 320, "context_dim": 1024, "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0]},
    clip=False,
)  # fmt: skip
SDXL = TinyCheckpoint(
    "SDXL",
    UNET
    | ONE_EACH
    | {
        "context_dim": 2 * WIDTH, "num_head_channels": 16, "use_linear_in_transformer": True,
        "num_classes": "sequential", "adm_in_channels": WIDTH + EMBEDDED,
        "transformer_depth": [0, 2], "transformer_depth_output": [0, 0, 2, 2], "transformer_depth_middle": 2,
    },
    ("model_channels", "context_dim", "num_head_channels", "adm_in_channels", "transformer_depth"),
    {
        "model_channels": 320, "context_dim": 2048, "adm_in_channels": 2816,
        "transformer_depth": [0, 0, 2, 2, 10, 10],
    },
)  # fmt: skip
SDXL_V = TinyCheckpoint(
    SDXL.family, SDXL.size, SDXL.said, SDXL.published,
    more=lambda: {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)},
)  # fmt: skip
SDXL_EDM = TinyCheckpoint(
    SDXL.family, SDXL.size, SDXL.said, SDXL.published,
    more=lambda: {"edm_vpred.sigma_max": torch.tensor(70.0), "edm_vpred.sigma_min": torch.tensor(0.005)},
)  # fmt: skip
# Its size is read from the tensors. Without T5 and CLIP-G its prompts are CLIP-L's, filled up with zeros.
SD3 = TinyCheckpoint(
    "SD3",
    {
        "input_size": None, "patch_size": 2, "in_channels": 16, "depth": 2, "pos_embed_max_size": 32,
        "num_patches": 1024, "adm_in_channels": WIDTH + OTHER_POOLED, "qk_norm": "rms",
        "context_embedder_config": {
            "target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 128}
        },
    },
    place=("comfy.ldm.modules.diffusionmodules.mmdit", "OpenAISignatureMMDITWrapper"),
    channels=16,
)  # fmt: skip
CHECKPOINTS = {
    "sd15": SD15, "sd2": SD2, "svd": SVD, "sdxl": SDXL, "sdxl v": SDXL_V, "sdxl edm": SDXL_EDM, "sd3": SD3,
}  # fmt: skip


@contextmanager
def small_text_encoders() -> Iterator[None]:
    """Within, ComfyUI builds text encoders in the size of CLIP, whatever their configuration says."""
    sd1_clip = importlib.import_module("comfy.sd1_clip")
    stock = sd1_clip.SDClipModel.__init__

    @functools.wraps(stock)
    def build(self: Any, *args: Any, textmodel_json_config: Any = None, **kwargs: Any) -> None:
        file = textmodel_json_config or str(Path(sd1_clip.__file__).with_name("sd1_clip_config.json"))
        config = json.loads(Path(file).read_text()) | CLIP
        options = {"model_name": "clip_l"} | kwargs.pop("model_options", {})
        stock(self, *args, textmodel_json_config=config, model_options=options, **kwargs)

    sd1_clip.SDClipModel.__init__ = build
    try:
        yield
    finally:
        sd1_clip.SDClipModel.__init__ = stock


def parts(name: str) -> dict[str, Tensors]:
    """The tensors of a file by what they are of ("model", "clip", "vae", "more"), under their names there.

    Text encoders are of the size that `small_text_encoders` gives them.
    """
    told = CHECKPOINTS[name]
    config = getattr(importlib.import_module("comfy.supported_models"), told.family)(dict(told.size))
    with torch.inference_mode(False):
        model = _model(told).state_dict() | ({_key(told): torch.zeros(1)} if told.said else {})
        return {
            "model": {f"{MODEL}{key}": tensor for key, tensor in model.items()},
            "clip": _text_encoders(config) if told.clip else {},
            "vae": config.process_vae_state_dict_for_saving(_vae(told.channels)),
            "more": told.more(),
        }


def write(name: str, folder: Path, *without: str, file: str = "") -> str:
    """Write a checkpoint, maybe `without` some of its parts; its name for the loaders."""
    found = {part: tensors for part, tensors in parts(name).items() if part not in without}
    file = file or "_".join([name.replace(" ", "_"), *(f"without_{part}" for part in without)])
    save(functools.reduce(dict.__or__, found.values()), folder / f"{file}.safetensors")
    return f"{file}.safetensors"


def save(tensors: Tensors, path: Path, metadata: dict[str, str] | None = None) -> None:
    """As safetensors wants them: each with memory of its own."""
    save_file({key: tensor.clone().contiguous() for key, tensor in tensors.items()}, path, metadata)


def _model(told: TinyCheckpoint) -> torch.nn.Module:
    module, name = told.place
    ops = importlib.import_module("comfy.ops").disable_weight_init
    made = getattr(importlib.import_module(module), name)
    return randomised(made(**told.size, device="cpu", dtype=torch.float32, operations=ops), 1)


def _text_encoders(config: Any) -> Tensors:
    mark = (
        "text_encoders.clip_l.transformer.text_model.final_layer_norm.weight"  # SD3's are those of the file
    )
    target = config.clip_target(state_dict={mark: torch.zeros(1)})
    module = randomised(target.clip(device="cpu", dtype=torch.float32, model_options={}), 2)
    state = {key: t for key, t in module.state_dict().items() if not key.endswith("logit_scale")}
    return config.process_clip_state_dict_for_saving(state)


def _vae(channels: int) -> Tensors:
    """Of the small kind, as that is the one whose width no configuration says."""
    taesd = importlib.import_module("comfy.taesd.taesd").TAESD(latent_channels=channels)
    return randomised(taesd, 3).state_dict()


def randomised(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Every weight at a scale that keeps numbers in range and lets each count."""
    generator = torch.Generator().manual_seed(seed)
    for key, tensor in module.state_dict().items():
        if tensor.is_floating_point() and tensor.ndim > 0:
            scale = 0.7 / tensor[0].numel() ** 0.5 if tensor.ndim > 1 else 0.1
            ones = tensor.ndim == 1 and key.endswith("weight")
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale + float(ones))
    return module.eval().requires_grad_(False)


def _key(told: TinyCheckpoint) -> str:
    """The name of the tensor that says what detection takes from the published model."""
    sys.path.append(str(SHIM))
    tiny_detection = importlib.import_module("tiny_detection")
    sys.path.remove(str(SHIM))
    said = {name: told.size[name] for name in told.said}
    return tiny_detection.key(said | {tiny_detection.PUBLISHED: told.published})
