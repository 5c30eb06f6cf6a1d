"""Train the demo model from nothing, on pictures drawn here, and save it for diffusers and ComfyUI.

python scripts/train_demo_model.py --out assets/demo

About 30 minutes on one CPU core, less on two. The schedules count steps, never
seconds: the same --minutes and --threads give the same model on the same kind of machine.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from check_demo_pictures import Score, held_out_captions, score
from demo_networks import (
    TEXT_LENGTH,
    build_text_encoder,
    build_tokenizer,
    build_transformer,
    settle_vocabulary,
    single_file_state,
)
from demo_pictures import Scene, caption_of, default_parts, draw_picture, training_scenes
from demo_vae import (
    adopt_sd3_constants,
    build_vae,
    encode_pictures,
    signal_to_noise,
    to_tensor,
    train_vae,
)
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from moving_average import MovingAverage
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTokenizer

NOMINAL_MINUTES = 30
VAE_STEPS, TRANSFORMER_STEPS = 2200, 2800  # what one slow core does in NOMINAL_MINUTES
DRAWINGS_PER_SCENE = 4
BATCH = 64
SHIFT = 3.0  # flat colours are decided at high noise; also what ComfyUI samples SD3 with
EMPTY_CAPTION_SHARE = 0.1
OMISSION_SHARE = 0.6  # of the parts which are what a shorter caption would give as well
COMMA_SHARE = 0.2
# diffusers' pipeline stands max_sequence_length zero tokens in for a missing T5: the model
# must get used to them, for a third of the time (they are slow), and mostly to none.
ZERO_TOKENS = (0, 0, 16, 77, 256)
ZERO_TOKENS_FROM = 2 / 3
MUON_RATE, ADAM_RATE = 2e-3, 1e-3
_WARM_UP = 100

Report = Callable[[str], None]


def training_caption(scene: Scene, rng: random.Random) -> str:
    """A caption as people write it: often without the obvious parts, sometimes with commas."""
    if rng.random() < EMPTY_CAPTION_SHARE:
        return ""
    defaults = default_parts(scene.colour)
    omitted = {
        name: None
        for name, default in defaults.items()
        if getattr(scene, name) == default and rng.random() < OMISSION_SHARE
    }
    scene = replace(scene, **omitted)
    caption = caption_of(scene)
    for part in (scene.position, scene.background and "on a"):
        if part and rng.random() < COMMA_SHARE:
            caption = caption.replace(f" {part}", f", {part}")
    return caption


def drawn_latents(vae: AutoencoderKL, scenes: Sequence[Scene], report: Report) -> torch.Tensor:
    """Latents of DRAWINGS_PER_SCENE drawings of each scene: (scene, drawing, 16, 16, 16)."""
    rng = random.Random(2)
    drawings, start = [], time.monotonic()
    for scene in scenes:
        pictures = to_tensor([draw_picture(scene, rng) for _ in range(DRAWINGS_PER_SCENE)])
        drawings.append(encode_pictures(vae, pictures))
    latents = torch.stack(drawings)
    report(
        f"latents {tuple(latents.shape)}  mean {latents.mean():.3f}  "
        f"deviation {latents.std():.3f}  {time.monotonic() - start:.0f} s"
    )
    return latents


def build_pipeline(vae: AutoencoderKL) -> StableDiffusion3Pipeline:
    """The untrained pipeline around a trained autoencoder; it has no T5 encoder."""
    tokenizer = build_tokenizer()
    return StableDiffusion3Pipeline(
        transformer=build_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=vae,
        text_encoder=build_text_encoder(len(tokenizer), "quick_gelu"),
        tokenizer=tokenizer,
        text_encoder_2=build_text_encoder(len(tokenizer), "gelu"),
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )


class TrainingTexts:
    """Captions as token numbers, in varying words; each caption is tokenized once."""

    def __init__(self, tokenizer: CLIPTokenizer, scenes: Sequence[Scene]) -> None:
        self.tokenizer = tokenizer
        self.scenes = scenes
        self.known: dict[str, torch.Tensor] = {}

    def tokens(self, caption: str) -> torch.Tensor:
        if caption not in self.known:
            self.known[caption] = self.tokenizer(
                caption, padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt"
            ).input_ids[0]
        return self.known[caption]

    def batch(self, indices: Sequence[int], rng: random.Random) -> torch.Tensor:
        captions = [training_caption(self.scenes[i], rng) for i in indices]
        return torch.stack([self.tokens(caption) for caption in captions])


def encode_texts(
    pipeline: StableDiffusion3Pipeline, tokens: torch.Tensor, zero_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Context and pooled embedding, put together as diffusers and ComfyUI do."""
    encoders = (pipeline.text_encoder, pipeline.text_encoder_2)
    outputs = [encoder(tokens, output_hidden_states=True) for encoder in encoders]
    context = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    zeros = context.new_zeros(len(context), zero_tokens, context.shape[-1])
    pooled = torch.cat([output.text_embeds for output in outputs], dim=-1)
    return torch.cat([context, zeros], dim=1), pooled


def build_optimizers(modules: Sequence[nn.Module]) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside blocks (two to three times faster here), AdamW for the rest."""
    named = [pair for module in modules for pair in module.named_parameters()]
    inner = [
        parameter.ndim == 2 and ("transformer_blocks." in name or ".layers." in name)
        for name, parameter in named
    ]
    matrices = [p for (_, p), chosen in zip(named, inner, strict=True) if chosen]
    others = [p for (_, p), chosen in zip(named, inner, strict=True) if not chosen]
    return [
        torch.optim.Muon(
            matrices,
            lr=MUON_RATE,
            momentum=0.95,
            weight_decay=0.01,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(others, lr=ADAM_RATE, betas=(0.9, 0.99), weight_decay=0.01),
    ]


def rate_schedule(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to 5 %."""
    warm_up = min(1.0, (step + 1) / _WARM_UP)
    return warm_up * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def noise_levels(count: int) -> torch.Tensor:
    """Random sigmas (count): logit-normal, shifted."""
    u = torch.sigmoid(torch.randn(count))
    return SHIFT * u / (1 + (SHIFT - 1) * u)


def velocity_loss(
    pipeline: StableDiffusion3Pipeline, latents: torch.Tensor, tokens: torch.Tensor, zeros: int
) -> torch.Tensor:
    """Rectified flow: predict noise minus picture from a mixture of both."""
    sigma = noise_levels(len(latents))
    noise = torch.randn_like(latents)
    weight = sigma.view(-1, 1, 1, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        context, pooled = encode_texts(pipeline, tokens, zeros)
        predicted = pipeline.transformer(
            hidden_states=(1 - weight) * latents + weight * noise,
            timestep=1000 * sigma,
            encoder_hidden_states=context,
            pooled_projections=pooled,
            return_dict=False,
        )[0]
    return (predicted.float() - (noise - latents)).square().mean()


def training_batches(
    texts: TrainingTexts, latents: torch.Tensor, steps: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
    """Latents, tokens and the number of zero tokens for each step."""
    rng = random.Random(3)
    for step in range(steps):
        indices = [rng.randrange(len(latents)) for _ in range(BATCH)]
        drawings = [rng.randrange(DRAWINGS_PER_SCENE) for _ in range(BATCH)]
        zeros = rng.choice(ZERO_TOKENS) if step >= steps * ZERO_TOKENS_FROM else 0
        yield latents[indices, drawings], texts.batch(indices, rng), zeros


def train_transformer(
    pipeline: StableDiffusion3Pipeline,
    latents: torch.Tensor,
    scenes: Sequence[Scene],
    steps: int,
    report: Report,
) -> Iterator[int]:
    """Train transformer and text encoders; pauses four times with the average weights in place."""
    modules = (pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2)
    parameters = [p for module in modules for p in module.parameters()]
    optimizers = build_optimizers(modules)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_schedule(step, steps))
        for optimizer in optimizers
    ]
    average = MovingAverage(modules, 0.999)
    start, recent = time.monotonic(), 0.0
    batches = training_batches(TrainingTexts(pipeline.tokenizer, scenes), latents, steps)
    for step, batch in enumerate(batches, start=1):
        loss = velocity_loss(pipeline, *batch)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for stepper in (*optimizers, *schedules):
            stepper.step()
        for optimizer in optimizers:
            optimizer.zero_grad()
        average.update()
        recent += loss.item() / 100
        if step % 100 == 0:
            seconds = time.monotonic() - start
            report(f"transformer {step}/{steps}  loss {recent:.4f}  {seconds:.0f} s")
            recent = 0.0
        if step % max(1, steps // 4) == 0 or step == steps:
            average.swap()
            yield step
            if step < steps:
                average.swap()


@torch.no_grad()
def score_pipeline(pipeline: StableDiffusion3Pipeline, seed: int, zero_tokens: int) -> Score:
    """Draw the 50 held-out captions and read them back."""
    captions = held_out_captions()
    pipeline.set_progress_bar_config(disable=True)
    pictures = pipeline(
        captions,
        num_inference_steps=20,
        guidance_scale=3.0,
        max_sequence_length=zero_tokens,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
    ).images
    return score(captions, list((pictures * 255).round().astype("uint8")))


def save_demo_model(pipeline: StableDiffusion3Pipeline, folder: Path) -> None:
    """The pipeline folder for diffusers and the transformer's single file for ComfyUI, in fp16."""
    # The tokenizer remembers how it was last called; that is no part of the model.
    pipeline.tokenizer.backend_tokenizer.no_padding()
    pipeline.tokenizer.backend_tokenizer.no_truncation()
    pipeline.to(torch.float16).save_pretrained(folder / "pipeline")
    for name in ("tokenizer", "tokenizer_2"):
        # Older readers want the vocabulary and the merges as separate files.
        pipeline.tokenizer.backend_tokenizer.model.save(str(folder / "pipeline" / name))
    save_file(
        single_file_state(pipeline.transformer),
        folder / "demo_sd3.safetensors",
        metadata={"format": "pt"},
    )
    pipeline.to(torch.float32)


def load_demo_model(folder: Path) -> StableDiffusion3Pipeline:
    """The pipeline that `save_demo_model` wrote below `folder`, in fp32 and with its weights frozen."""
    absent = dict.fromkeys(("text_encoder_3", "tokenizer_3", "image_encoder", "feature_extractor"))
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder / "pipeline", **absent).to(torch.float32)
    for module in (pipeline.transformer, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
        module.eval().requires_grad_(False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_vae(scenes: Sequence[Scene], steps: int, report: Report) -> AutoencoderKL:
    vae = train_vae(scenes, steps, report)
    rng = random.Random(1)
    sample = to_tensor([draw_picture(rng.choice(scenes), rng) for _ in range(128)])
    adopt_sd3_constants(vae, sample)
    report(f"vae: {signal_to_noise(vae, sample):.1f} dB")
    return vae


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("assets/demo"))
    parser.add_argument(
        "--minutes",
        type=float,
        default=NOMINAL_MINUTES,
        help="about how long, on one slow core; scales the numbers of steps",
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae", type=Path, help="folder of a trained autoencoder to keep")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    start = time.monotonic()

    def report(line: str) -> None:
        print(line, flush=True)

    share = options.minutes / NOMINAL_MINUTES
    scenes = training_scenes()
    if options.vae:
        # Only its weights: diffusers would save the folder it came from with the configuration.
        vae = build_vae().eval().requires_grad_(False)
        vae.load_state_dict(AutoencoderKL.from_pretrained(options.vae).state_dict())
    else:
        vae = make_vae(scenes, max(4, round(VAE_STEPS * share)), report)
    latents = drawn_latents(vae, scenes, report)
    # Seeded anew, so that the rest does not depend on whether the autoencoder was given.
    torch.manual_seed(options.seed)
    pipeline = build_pipeline(vae)
    steps = max(4, round(TRANSFORMER_STEPS * share))
    for step in train_transformer(pipeline, latents, scenes, steps, report):
        report(f"after {step} steps: {score_pipeline(pipeline, seed=1, zero_tokens=0)}")
    for encoder in (pipeline.text_encoder, pipeline.text_encoder_2):
        settle_vocabulary(encoder, pipeline.tokenizer)
    save_demo_model(pipeline, options.out)
    for zero_tokens in (0, 77):
        for seed in (1, 3, 5):
            result = score_pipeline(pipeline, seed, zero_tokens)
            report(f"final, seed {seed}, {zero_tokens} zero tokens: {result}")
    report(f"saved to {options.out} after {(time.monotonic() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
