"""LoRA files with random content, in the namings and kinds that are found in the wild."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

RANK = 4
Tensors = dict[str, torch.Tensor]


class Random:
    """Tensors of a size at which the patch changes a weight by about a tenth."""

    def __init__(self, seed: int):
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator) * scale


def native(model: Any, kind: str, seed: int, only: str = "") -> Tensors:
    """A file in kohya's naming of ComfyUI's names, for every matrix of a MODEL."""
    make, random = KINDS[kind], Random(seed)
    tensors: Tensors = {}
    for key, weight in model.model.state_dict().items():
        name = key.removeprefix("diffusion_model.")
        if key != name and name.endswith(".weight") and weight.ndim == 2 and only in name:
            at = f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}"
            tensors |= {f"{at}.{part}": t for part, t in make(random, *weight.shape).items()}
    return tensors


def diffusers(module: torch.nn.Module, seed: int) -> Tensors:
    """A file as peft writes it, for every linear layer of a diffusers transformer."""
    random = Random(seed)
    tensors: Tensors = {}
    for name, layer in module.named_modules():
        if isinstance(layer, torch.nn.Linear):
            parts = lora(random, *layer.weight.shape)
            tensors[f"transformer.{name}.lora_B.weight"] = parts["lora_up.weight"]
            tensors[f"transformer.{name}.lora_A.weight"] = parts["lora_down.weight"]
            tensors[f"transformer.{name}.alpha"] = parts["alpha"]
    return tensors


def lora(random: Random, rows: int, columns: int) -> Tensors:
    return {
        "lora_up.weight": random(rows, RANK),
        "lora_down.weight": random(RANK, columns, scale=0.1 / columns**0.5),
        "alpha": torch.tensor(2.0),
    }


def dora(random: Random, rows: int, columns: int) -> Tensors:
    return lora(random, rows, columns) | {"dora_scale": 0.5 + 0.05 * random(rows, 1)}


def loha(random: Random, rows: int, columns: int) -> Tensors:
    return {
        "hada_w1_a": random(rows, RANK),
        "hada_w1_b": random(RANK, columns, scale=0.05),
        "hada_w2_a": random(rows, RANK),
        "hada_w2_b": random(RANK, columns, scale=1 / columns**0.5),
        "alpha": torch.tensor(3.0),
    }


def lokr(random: Random, rows: int, columns: int) -> Tensors:
    return {
        "lokr_w1": random(2, 2),
        "lokr_w2_a": random(rows // 2, RANK),
        "lokr_w2_b": random(RANK, columns // 2, scale=0.1 / columns**0.5),
        "alpha": torch.tensor(2.0),
    }


def glora(random: Random, rows: int, columns: int) -> Tensors:
    return {
        "a1.weight": random(columns, RANK, scale=0.05),
        "a2.weight": random(RANK, columns, scale=0.05),
        "b1.weight": random(rows, RANK),
        "b2.weight": random(RANK, columns, scale=0.1 / columns**0.5),
        "alpha": torch.tensor(2.0),
    }


def oft(random: Random, rows: int, columns: int) -> Tensors:
    return {"oft_blocks": random(rows // 4, 4, 4, scale=0.05), "alpha": torch.tensor(0.0)}


def boft(random: Random, rows: int, columns: int) -> Tensors:
    return {"oft_blocks": random(2, rows // 8, 8, 8, scale=0.1), "alpha": torch.tensor(4.0)}


def diff(random: Random, rows: int, columns: int) -> Tensors:
    return {"diff": random(rows, columns, scale=0.1 / columns**0.5), "diff_b": random(rows, scale=0.1)}


def set_weight(random: Random, rows: int, columns: int) -> Tensors:
    return {"set_weight": random(rows, columns, scale=0.5 / columns**0.5)}


KINDS: dict[str, Callable[..., Tensors]] = {
    "lora": lora,
    "dora": dora,
    "loha": loha,
    "lokr": lokr,
    "glora": glora,
    "oft": oft,
    "boft": boft,
    "diff": diff,
    "set": set_weight,
}
