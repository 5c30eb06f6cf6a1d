"""Train a LoRA that makes the demo model frame its pictures, and say how well it does.

python scripts/train_demo_lora.py --out assets/demo

A few minutes on one CPU core. Trained with peft (pip install peft) on the shipped transformer.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from check_demo_pictures import Score, has_frame, held_out_captions, score, without_frame
from demo_pictures import Scene, draw_picture, training_scenes
from demo_vae import encode_pictures, to_tensor
from diffusers import StableDiffusion3Pipeline
from moving_average import MovingAverage
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import nn
from train_demo_model import TrainingTexts, load_demo_model, rate_schedule, velocity_loss

NAME = "demo_framed_lora.safetensors"
RANK = 16
BATCH = 32
SCENES = 2048  # of the training scenes, each drawn once
RATE = 3e-3
# Attention and MLP of the picture's stream: the text's says what is drawn, not how.
TARGETS = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff.net.0.proj", "ff.net.2"]


def framed_latents(pipeline: StableDiffusion3Pipeline, scenes: Sequence[Scene]) -> torch.Tensor:
    """Latents (scene, 16, 16, 16) of one framed drawing of each scene."""
    rng = random.Random(2)
    parts = [scenes[i : i + 64] for i in range(0, len(scenes), 64)]
    return torch.cat(
        [
            encode_pictures(pipeline.vae, to_tensor([draw_picture(s, rng, framed=True) for s in part]))
            for part in parts
        ]
    )


def train(pipeline: StableDiffusion3Pipeline, steps: int) -> None:
    """Add an adapter to the transformer and train it alone, as the model itself was trained."""
    scenes = random.Random(4).sample(training_scenes(), SCENES)
    latents = framed_latents(pipeline, scenes)
    transformer = pipeline.transformer
    transformer.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS))
    parameters = [p for p in transformer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_schedule(step, steps))
    average = MovingAverage([nn.ParameterList(parameters)], 0.99)
    texts, rng = TrainingTexts(pipeline.tokenizer, scenes), random.Random(3)
    start, recent = time.monotonic(), 0.0
    for step in range(1, steps + 1):
        indices = [rng.randrange(len(scenes)) for _ in range(BATCH)]
        loss = velocity_loss(pipeline, latents[indices], texts.batch(indices, rng), 0)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        average.update()
        recent += loss.item() / 50
        if step % 50 == 0:
            print(f"{step}/{steps}  loss {recent:.4f}  {time.monotonic() - start:.0f} s", flush=True)
            recent = 0.0
    average.swap()


def save(pipeline: StableDiffusion3Pipeline, folder: Path) -> None:
    """As diffusers saves a LoRA, in fp16."""
    tensors = get_peft_model_state_dict(pipeline.transformer, adapter_name="default")
    pipeline.save_lora_weights(
        folder,
        transformer_lora_layers={name: tensor.half() for name, tensor in tensors.items()},
        weight_name=NAME,
    )


@torch.no_grad()
def evaluate(pipeline: StableDiffusion3Pipeline, captions: Sequence[str], seed: int) -> tuple[float, Score]:
    """The share of framed pictures, and how well they follow their captions."""
    pictures = pipeline(
        list(captions),
        num_inference_steps=20,
        guidance_scale=3.0,
        max_sequence_length=0,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
    ).images
    drawn = list((pictures * 255).round().astype("uint8"))
    return float(np.mean([has_frame(p) for p in drawn])), score(captions, [without_frame(p) for p in drawn])


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, save, load what was saved, and print what the checker reads."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("assets/demo"), help="where pipeline/ is as well")
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    pipeline = load_demo_model(options.out)
    train(pipeline, options.steps)
    save(pipeline, options.out)
    pipeline = load_demo_model(options.out)
    captions = held_out_captions()[:30]
    for name in (None, NAME):
        if name:
            pipeline.load_lora_weights(options.out, weight_name=name)
        for seed in (1, 3, 5):
            style, content = evaluate(pipeline, captions, seed)
            print(f"{name or 'without'}, seed {seed}: framed {100 * style:.1f} %  {content}", flush=True)


if __name__ == "__main__":
    main()
