"""Tiny diffusers folders of families that are read from folders alone, and plain diffusers to compare with.

The reference calls the class as diffusers' own pipelines do; it shares no code with the ranks.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from tests.plan_cases import CASES

Given = dict[str, Any]
DDIM = {"_class_name": "DDIMScheduler", "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
COG = {
    "_class_name": "CogVideoXDDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True,
    "snr_shift_scale": 3.0, "timestep_spacing": "trailing", "clip_sample": False, "set_alpha_to_one": True,
}  # fmt: skip
KL = {"_class_name": "AutoencoderKL", "latent_channels": 4, "block_out_channels": [8, 8, 8, 8]}
KL |= {"scaling_factor": 0.18215}
COG_VAE = {"_class_name": "AutoencoderKLCogVideoX", "latent_channels": 4, "block_out_channels": [8, 8, 8, 8]}
COG_VAE |= {"temporal_compression_ratio": 4, "scaling_factor": 0.7}
STATISTICS = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.5, 0.7, 1.0, 2.0]}
TEXT = 7  # tokens of a prompt


@dataclass(frozen=True)
class FolderCase:
    """A pipeline's folder.

    Args:
        plan: its class, of tests.plan_cases.
        config: of the class, beside what that case says.
        scheduler, vae: their configurations.
        shape: of a latent, with a batch of two.
        conditions: what ComfyUI's call brings, of so many rows.
        reference: what diffusers' pipeline gives the class, by module, latent, timestep and conditions.
        stages: whether PipeFusion is for it.
        beside: channels beside the latent's.
    """

    plan: str
    scheduler: Given
    vae: Given
    shape: tuple[int, ...]
    conditions: Callable[[int], Given]
    reference: Callable[[Any, torch.Tensor, torch.Tensor, Given], torch.Tensor]
    config: Given = field(default_factory=dict)
    stages: bool = True
    beside: int = 0

    def build(self) -> torch.nn.Module:
        """The transformer, every weight random."""
        case = CASES[self.plan]
        return replace(case, config=case.config | self.config).build()

    def write(self, root: Path) -> torch.nn.Module:
        """The folder, as save_pretrained leaves it; gives the transformer in it."""
        module = self.build().requires_grad_(False)
        module.save_pretrained(root / "transformer")
        for name, words in (
            ("model_index.json", {"_class_name": "DiffusionPipeline"}),
            ("scheduler/scheduler_config.json", self.scheduler),
            ("vae/config.json", self.vae),
        ):
            (root / name).parent.mkdir(exist_ok=True)
            (root / name).write_text(json.dumps(words))
        return module

    def latent(self, seed: int = 1, batch: int = 2) -> torch.Tensor:
        """Noise of the case's shape, with the channels beside it."""
        _, channels, *sizes = self.shape
        return drawn(batch, channels + self.beside, *sizes, seed=seed)


def drawn(*shape: int, seed: int) -> torch.Tensor:
    """Random numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _context(width: int, tokens: int = TEXT) -> Callable[[int], Given]:
    return lambda batch: {"context": drawn(batch, tokens, width, seed=2)}


def _masked(width: int, tokens: int = TEXT) -> Callable[[int], Given]:
    def conditions(batch: int) -> Given:
        mask = (torch.arange(tokens) < tokens - 2).float().expand(batch, -1).clone()
        mask[0, -2:] = 1.0
        return {"context": drawn(batch, tokens, width, seed=2), "attention_mask": mask}

    return conditions


def _called(module: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        return module(*args, **kwargs, return_dict=False)[0]


def _cog(module: Any, x: torch.Tensor, t: torch.Tensor, given: Given) -> torch.Tensor:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed
    from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

    config, frames = module.config, x.shape[2]
    rows, columns = x.shape[-2] // config.patch_size, x.shape[-1] // config.patch_size
    base = config.sample_width // config.patch_size, config.sample_height // config.patch_size
    more = {name: given[name] for name in ("id_cond", "id_vit_hidden") if name in given}
    if config.use_rotary_positional_embeddings:
        if config.get("patch_size_t") is None:
            crop = get_resize_crop_region_for_grid((rows, columns), *base)
            table = get_3d_rotary_pos_embed(config.attention_head_dim, crop, (rows, columns), frames)
        else:
            table = get_3d_rotary_pos_embed(
                config.attention_head_dim, None, (rows, columns), frames // config.patch_size_t,
                grid_type="slice", max_size=base[::-1],
            )  # fmt: skip
        more["image_rotary_emb"] = table
    if config.get("ofs_embed_dim"):
        more["ofs"] = x.new_full((1,), 2.0)
    out = _called(module, x.transpose(1, 2), given["context"], t, **more)
    return out.transpose(1, 2)


def _hunyuan_dit(module: Any, x: torch.Tensor, t: torch.Tensor, given: Given) -> torch.Tensor:
    from diffusers.models.embeddings import get_2d_rotary_pos_embed
    from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import get_resize_crop_region_for_grid

    patch, heads = module.config.patch_size, module.config.num_attention_heads
    grid = x.shape[-2] // patch, x.shape[-1] // patch
    crop = get_resize_crop_region_for_grid(grid, 512 // 8 // patch)
    table = get_2d_rotary_pos_embed(module.inner_dim // heads, crop, grid, output_type="pt")
    out = _called(
        module, x, t, given["context"], given["text_embedding_mask"], given["encoder_hidden_states_t5"],
        given["text_embedding_mask_t5"], given["image_meta_size"], torch.zeros(len(x), dtype=torch.long),
        table,
    )  # fmt: skip
    return out.chunk(2, 1)[0]


def _hunyuan_dit_given(batch: int) -> Given:
    first, second = _masked(32, 5)(batch), _masked(24, 5)(batch)
    sizes = torch.tensor([[80.0, 112.0, 80.0, 112.0, 0.0, 0.0]]).repeat(batch, 1)
    return {
        "context": first["context"], "text_embedding_mask": first["attention_mask"],
        "encoder_hidden_states_t5": second["context"], "text_embedding_mask_t5": second["attention_mask"],
        "image_meta_size": sizes,
    }  # fmt: skip


def _face(batch: int) -> Given:
    vit = [drawn(batch, 5, 24, seed=10 + i) for i in range(5)]
    return _context(32, 5)(batch) | {"id_cond": drawn(batch, 24, seed=3), "id_vit_hidden": vit}


def _pooled(batch: int) -> Given:
    given = _masked(32)(batch)
    given["attention_mask"] = given["attention_mask"].sort(descending=True).values
    return given | {"y": drawn(batch, 24, seed=3), "guidance": torch.full((batch,), 4.0)}


def _hunyuan_video(module: Any, x: torch.Tensor, t: torch.Tensor, given: Given) -> torch.Tensor:
    mask, guidance = given["attention_mask"].long(), given["guidance"] * 1000.0
    return _called(module, x, t, given["context"], mask, given["y"], guidance)


def _mochi(module: Any, x: torch.Tensor, t: torch.Tensor, given: Given) -> torch.Tensor:
    """Its time runs backwards: 1,000 - t, towards the picture."""
    with warnings.catch_warnings():  # its attention pool asks for fp32 in a way that CPUs ignore
        warnings.filterwarnings("ignore", "In CPU autocast", UserWarning)
        return -_called(module, x, given["context"], 1000.0 - t, given["attention_mask"].bool())


def _wan(module: Any, x: torch.Tensor, t: torch.Tensor, given: Given) -> torch.Tensor:
    pictures = given.get("clip_fea")
    if module.config.pos_embed_seq_len is not None:  # its pipeline has one row for each picture
        pictures = torch.stack([half for row in pictures for half in row.chunk(2)])
    return _called(module, x, t, given["context"], pictures)


def _sana(module: Any, x: torch.Tensor, t: torch.Tensor, given: Given) -> torch.Tensor:
    t = t * module.config.timestep_scale
    return _called(module, x, given["context"], t, encoder_attention_mask=given["attention_mask"].long())


def _dit(module: Any, x: torch.Tensor, t: torch.Tensor, given: Given) -> torch.Tensor:
    labels = torch.tensor([4, module.config.num_embeds_ada_norm])[: len(x)]  # -1 is none
    return _called(module, x, timestep=t, class_labels=labels).chunk(2, 1)[0]


def _latte(module: Any, x: torch.Tensor, t: torch.Tensor, given: Given) -> torch.Tensor:
    return _called(module, x, encoder_hidden_states=given["context"], timestep=t).chunk(2, 1)[0]


def _pixart(module: Any, x: torch.Tensor, t: torch.Tensor, given: Given) -> torch.Tensor:
    size = torch.tensor([[80.0, 112.0]]).repeat(len(x), 1) if module.use_additional_conditions else None
    sizes = {"resolution": size, "aspect_ratio": None if size is None else size[:, :1] / size[:, 1:]}
    mask = given["attention_mask"].long()
    out = _called(module, x, given["context"], t, encoder_attention_mask=mask, added_cond_kwargs=sizes)
    return out.chunk(2, 1)[0]


_WAN_VAE = {"_class_name": "AutoencoderKLWan", "z_dim": 4, **STATISTICS}
_UNIPC = {
    "_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction", "use_flow_sigmas": True,
    "flow_shift": 5.0,
}  # fmt: skip
_WIDE, _VIDEO = (2, 4, 10, 14), (2, 4, 3, 10, 6)


def _pictured(tokens: int, config: Given) -> FolderCase:
    """Wan that begins with a picture, of real channels, by which ComfyUI knows it."""
    return FolderCase(
        "Wan 2.1 I2V",
        _UNIPC,
        _WAN_VAE | {"z_dim": 16} | {name: numbers * 4 for name, numbers in STATISTICS.items()},
        (2, 16, 3, 10, 6),
        lambda batch: _context(32, 512)(batch) | {"clip_fea": drawn(batch, tokens, 24, seed=3)},
        _wan,
        {"in_channels": 36, "out_channels": 16} | config,
        beside=20,
    )


FOLDERS: dict[str, FolderCase] = {
    "PixArt-Sigma": FolderCase("PixArt", DDIM, KL | {"scaling_factor": 0.13025}, _WIDE, _masked(32), _pixart),
    "PixArt-alpha": FolderCase(
        "PixArt", DDIM, KL, _WIDE, _masked(32), _pixart,
        {"use_additional_conditions": True, "attention_head_dim": 24, "cross_attention_dim": 96},
    ),
    "Latte": FolderCase(
        "Latte", DDIM, KL, (2, 4, 5, 10, 6), _context(32), _latte, {"out_channels": 8}, stages=False
    ),
    "DiT-XL": FolderCase(
        "DiT-XL", DDIM, KL, (2, 4, 10, 10), lambda batch: {"class_labels": torch.tensor([[4], [-1]])[:batch]},
        _dit, {"num_embeds_ada_norm": 9}, stages=False,
    ),
    "SANA": FolderCase(
        "SANA", {**_UNIPC, "_class_name": "DPMSolverMultistepScheduler", "flow_shift": 3.0},
        {"_class_name": "AutoencoderDC", "latent_channels": 4, "encoder_block_out_channels": [8] * 6,
         "scaling_factor": 0.41407},
        _WIDE, _masked(32), _sana, {"timestep_scale": 0.5}, stages=False,
    ),
    "Wan 2.1 T2V": FolderCase("Wan 2.1 T2V", _UNIPC, _WAN_VAE, _VIDEO, _context(32, 512), _wan),
    "Wan 2.1 I2V": _pictured(5, {}),
    "Wan 2.1 FLF2V": _pictured(10, {"pos_embed_seq_len": 10}),  # a first and a last frame
    "HunyuanVideo": FolderCase(
        "HunyuanVideo", FLOW | {"shift": 7.0},
        {"_class_name": "AutoencoderKLHunyuanVideo", "latent_channels": 4, "scaling_factor": 0.476986},
        _VIDEO, _pooled, _hunyuan_video, {"guidance_embeds": True},
    ),
    "Mochi": FolderCase(
        "Mochi", FLOW | {"shift": 1.0, "invert_sigmas": True},
        {"_class_name": "AutoencoderKLMochi", "latent_channels": 4, "scaling_factor": 1.0, **STATISTICS},
        _VIDEO, _masked(32), _mochi, stages=False,
    ),
    "HunyuanDiT": FolderCase(
        "HunyuanDiT",
        DDIM | {"beta_start": 0.00085, "beta_end": 0.018, "beta_schedule": "scaled_linear",
                "prediction_type": "v_prediction"},
        KL | {"scaling_factor": 0.13025}, _WIDE, _hunyuan_dit_given, _hunyuan_dit,
        {"use_style_cond_and_image_meta_size": False, "cross_attention_dim_t5": 24, "text_len_t5": 5},
    ),
    "CogVideoX": FolderCase(
        "CogVideoX", COG, COG_VAE, _VIDEO, _context(32, 5), _cog,
        {"max_text_seq_length": 5, "use_rotary_positional_embeddings": False, "sample_width": 6,
         "sample_height": 10, "sample_frames": 9},
    ),
    "CogVideoX 5B I2V": FolderCase(
        "CogVideoX", COG | {"snr_shift_scale": 1.0}, COG_VAE, _VIDEO, _context(32), _cog,
        {"in_channels": 8, "out_channels": 4, "sample_width": 12, "sample_height": 8}, beside=4,
    ),
    "CogVideoX 1.5": FolderCase(
        "CogVideoX 1.5", COG | {"snr_shift_scale": 1.0}, COG_VAE, (2, 4, 4, 10, 6), _context(32), _cog,
        {"sample_width": 12, "sample_height": 20},
    ),
    "ConsisID": FolderCase(
        "ConsisID", COG, COG_VAE, _VIDEO, _face, _cog,
        {"in_channels": 8, "out_channels": 4, "max_text_seq_length": 5}, beside=4,
    ),
}  # fmt: skip
