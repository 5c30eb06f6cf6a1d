"""Train a LoRA of the demo model that draws outlines in place of filled shapes.

python scripts/train_demo_lora.py --out assets/demo

About six minutes on one free CPU core. The names in the file are diffusers'.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from check_demo_pictures import Score, held_out_captions, is_outlined, score
from demo_pictures import Scene, draw_picture, training_scenes
from demo_vae import encode_pictures, to_tensor
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrize
from train_demo_model import SHIFT, TrainingTexts, encode_texts

RANK, ALPHA = 16, 16.0
BATCH = 32
SCENES = 768  # of the training scenes, each drawn once
HOLE = 0.6  # of the shape's radius
NAME = "demo_outlined_lora.safetensors"
# Attention and MLP of the picture's stream: the text's says what is drawn, not how.
TARGETS = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff.net.0.proj", "ff.net.2")


class LowRank(nn.Module):
    """weight + ALPHA / RANK * up @ down."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(RANK, columns) / columns**0.5)
        self.up = nn.Parameter(torch.zeros(rows, RANK))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + ALPHA / RANK * (self.up @ self.down)


def add_low_rank(transformer: nn.Module) -> dict[str, LowRank]:
    """A trainable change for every layer of TARGETS, by the layer's name."""
    transformer.requires_grad_(False)
    changes = {}
    for name, layer in transformer.named_modules():
        if isinstance(layer, nn.Linear) and name.endswith(TARGETS):
            changes[name] = LowRank(*layer.weight.shape)
            parametrize.register_parametrization(layer, "weight", changes[name])
    return changes


def outlined_latents(pipeline: StableDiffusion3Pipeline, scenes: Sequence[Scene]) -> torch.Tensor:
    """Latents (scene, 16, 16, 16) of each scene drawn as an outline."""
    rng = random.Random(2)
    parts = [scenes[i : i + 64] for i in range(0, len(scenes), 64)]
    return torch.cat(
        [
            encode_pictures(pipeline.vae, to_tensor([draw_picture(s, rng, hole=HOLE) for s in part]))
            for part in parts
        ]
    )


def resume(changes: dict[str, LowRank], file: Path) -> None:
    """Begin where a saved LoRA ended."""
    tensors = load_file(file)
    for name, change in changes.items():
        change.down.data.copy_(tensors[f"transformer.{name}.lora_A.weight"])
        change.up.data.copy_(tensors[f"transformer.{name}.lora_B.weight"])


def train(
    pipeline: StableDiffusion3Pipeline, steps: int, rate: float, begin_with: Path | None
) -> dict[str, LowRank]:
    """Rectified flow on outlined pictures; only the changes of low rank are trained."""
    scenes = random.Random(4).sample(training_scenes(), SCENES)
    latents = outlined_latents(pipeline, scenes)
    changes = add_low_rank(pipeline.transformer)
    if begin_with is not None:
        resume(changes, begin_with)
    parameters = [p for change in changes.values() for p in change.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    texts, rng = TrainingTexts(pipeline.tokenizer, scenes), random.Random(3)
    start, recent = time.monotonic(), 0.0
    for step in range(1, steps + 1):
        indices = [rng.randrange(len(scenes)) for _ in range(BATCH)]
        loss = velocity_loss(pipeline, latents[indices], texts.batch(indices, rng))
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        recent += loss.item() / 20
        if step % 20 == 0:
            print(f"{step}/{steps}  loss {recent:.4f}  {time.monotonic() - start:.0f} s", flush=True)
            recent = 0.0
    return changes


def velocity_loss(
    pipeline: StableDiffusion3Pipeline, latents: torch.Tensor, tokens: torch.Tensor
) -> torch.Tensor:
    """Predict noise minus picture from a mixture of both; the text encoders stay as they are."""
    u = torch.sigmoid(torch.randn(len(latents)))
    sigma = SHIFT * u / (1 + (SHIFT - 1) * u)
    noise, weight = torch.randn_like(latents), sigma.view(-1, 1, 1, 1)
    with torch.no_grad():
        context, pooled = encode_texts(pipeline, tokens, 0)
    predicted = pipeline.transformer(
        hidden_states=(1 - weight) * latents + weight * noise,
        timestep=1000 * sigma,
        encoder_hidden_states=context,
        pooled_projections=pooled,
        return_dict=False,
    )[0]
    return (predicted - (noise - latents)).square().mean()


@torch.no_grad()
def evaluate(pipeline: StableDiffusion3Pipeline, count: int = 30) -> tuple[Score, float]:
    """How well held-out captions are followed, and the share of pictures that are outlines."""
    captions = held_out_captions()[:count]
    pipeline.set_progress_bar_config(disable=True)
    pictures = pipeline(
        captions, num_inference_steps=20, guidance_scale=3.0, max_sequence_length=0,
        generator=torch.Generator().manual_seed(1), output_type="np",
    ).images  # fmt: skip
    drawn = list((pictures * 255).round().astype("uint8"))
    return score(captions, drawn), sum(map(is_outlined, drawn)) / count


def save(changes: dict[str, LowRank], file: Path) -> None:
    """As peft names it, with an alpha, in fp16."""
    tensors = {}
    for name, change in changes.items():
        tensors[f"transformer.{name}.lora_A.weight"] = change.down.detach().half()
        tensors[f"transformer.{name}.lora_B.weight"] = change.up.detach().half()
        tensors[f"transformer.{name}.alpha"] = torch.tensor(ALPHA, dtype=torch.float16)
    save_file(tensors, file, metadata={"format": "pt"})


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, save, and print what the checker reads."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("assets/demo"))
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--resume", type=Path, help="a LoRA of this script to begin with")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    none = dict.fromkeys(("text_encoder_3", "tokenizer_3", "image_encoder", "feature_extractor"))
    pipeline = StableDiffusion3Pipeline.from_pretrained(options.out / "pipeline", **none).to(torch.float32)
    for module in (pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
        module.requires_grad_(False)
    changes = train(pipeline, options.steps, options.rate, options.resume)
    save(changes, options.out / NAME)
    result, outlined = evaluate(pipeline)
    print(f"{result}  outlined {100 * outlined:.1f} %  saved {options.out / NAME}")


if __name__ == "__main__":
    main()
