"""Train a ControlNet of the demo model that fills an edge picture, and say how well it does.

python scripts/train_demo_controlnet.py --out assets/demo

About 20 minutes on one CPU core. Shapes are drawn beside and between the places and sizes that the
words name, so that only the edges tell where they are. The result is diffusers' SD3ControlNetModel.
"""

from __future__ import annotations

import argparse
import copy
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from check_demo_pictures import FOLLOWED, edge_overlap
from demo_pictures import (
    Place,
    Scene,
    caption_of,
    draw_at,
    draw_edges,
    held_out_scenes,
    place_near,
    training_scenes,
)
from demo_vae import LATENT_CHANNELS, SD3_SHIFT, encode_pictures, to_tensor
from diffusers import (
    AutoencoderKL,
    SD3ControlNetModel,
    StableDiffusion3ControlNetPipeline,
    StableDiffusion3Pipeline,
)
from moving_average import MovingAverage
from PIL import Image
from torch import nn
from train_demo_model import (
    TrainingTexts,
    build_optimizers,
    encode_texts,
    load_demo_model,
    noise_levels,
    rate_schedule,
)

FOLDER = "controlnet"
CFG = 2.0
# The hint of workflows/demo_controlnet.json.
EXAMPLE, EXAMPLE_SHAPE, EXAMPLE_PLACE = "demo_edges.png", "triangle", Place(84, 44, 27)
BATCH = 32
DRAWINGS_PER_SCENE = 2
OMISSION_SHARE = 0.5  # of size and of position: words without them leave more to the edges
EMPTY_CAPTION_SHARE = 0.15
# The second half is trained as guided, so that guidance does not exaggerate words that name another place.
GUIDED_FROM, MOST_CFG = 0.5, 3.0
_NO_VARIANCE = -30.0  # its logarithm


class ShortenedTexts(TrainingTexts):
    """Captions, of which some leave out the size, the position, or everything."""

    def batch(self, indices: Sequence[int], rng: random.Random) -> torch.Tensor:
        """Token numbers (index, 16)."""
        return torch.stack([self.tokens(self._caption(self.scenes[i], rng)) for i in indices])

    def _caption(self, scene: Scene, rng: random.Random) -> str:
        if rng.random() < EMPTY_CAPTION_SHARE:
            return ""
        omitted = {name: None for name in ("size", "position") if rng.random() < OMISSION_SHARE}
        return caption_of(replace(scene, **omitted))


def build_controlnet(pipeline: StableDiffusion3Pipeline) -> SD3ControlNetModel:
    """One block, a copy of the transformer's first; ComfyUI and diffusers add its output behind that."""
    # A copy, since diffusers changes the configuration that it is given; without the folder it came from.
    transformer = copy.deepcopy(pipeline.transformer)
    transformer.register_to_config(_name_or_path="")
    return SD3ControlNetModel.from_transformer(
        transformer, num_layers=1, num_extra_conditioning_channels=0
    ).requires_grad_(True)


def hint_latents(pipeline: StableDiffusion3Pipeline, hints: torch.Tensor) -> torch.Tensor:
    """Hints (n, 3, 128, 128) from -1 to 1 as SD3's ControlNets take them: scaled, but not shifted."""
    return encode_pictures(pipeline.vae, hints) + SD3_SHIFT * pipeline.vae.config.scaling_factor


def drawn_latents(
    pipeline: StableDiffusion3Pipeline, scenes: Sequence[Scene]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents (scene, drawing, 16, 16, 16) of pictures and of their edges."""
    rng, pictures, hints = random.Random(2), [], []
    for scene in scenes:
        places = [place_near(scene, rng) for _ in range(DRAWINGS_PER_SCENE)]
        drawn = to_tensor([draw_at(scene, place, rng) for place in places])
        edges = to_tensor([draw_edges(scene.shape, place) for place in places])
        pictures.append(encode_pictures(pipeline.vae, drawn))
        hints.append(hint_latents(pipeline, edges))
    return torch.stack(pictures), torch.stack(hints)


def guided_loss(
    pipeline: StableDiffusion3Pipeline,
    controlnet: SD3ControlNetModel,
    latents: torch.Tensor,
    hints: torch.Tensor,
    tokens: torch.Tensor,
    cfg: float,
) -> torch.Tensor:
    """Predict noise minus picture from a mixture of both, guided by `cfg` as a sampler does.

    With edges and a caption a picture is almost settled, so that guidance may not change it.
    """
    sigma, noise = noise_levels(len(latents)), torch.randn_like(latents)
    weight = sigma.view(-1, 1, 1, 1)

    def predicted(tokens: torch.Tensor) -> torch.Tensor:
        context, pooled = encode_texts(pipeline, tokens, 0)
        given = {
            "hidden_states": (1 - weight) * latents + weight * noise,
            "timestep": 1000 * sigma,
            "encoder_hidden_states": context,
            "return_dict": False,
        }
        zeros = torch.zeros_like(pooled)
        (residuals,) = controlnet(controlnet_cond=hints, pooled_projections=zeros, **given)
        return pipeline.transformer(
            pooled_projections=pooled, block_controlnet_hidden_states=residuals, **given
        )[0].float()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        velocity = predicted(tokens)
        if cfg != 1:
            empty = TrainingTexts(pipeline.tokenizer, []).tokens("").expand_as(tokens)
            without = predicted(empty)
            velocity = without + cfg * (velocity - without)
    return (velocity - (noise - latents)).square().mean()


def train(pipeline: StableDiffusion3Pipeline, steps: int) -> SD3ControlNetModel:
    """Train a ControlNet alone; the model that it guides stays as it is."""
    scenes = training_scenes()
    start = time.monotonic()
    latents, hints = drawn_latents(pipeline, scenes)
    print(f"latents {tuple(latents.shape)}  {time.monotonic() - start:.0f} s", flush=True)
    controlnet = build_controlnet(pipeline)
    optimizers = build_optimizers([controlnet])
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_schedule(step, steps))
        for optimizer in optimizers
    ]
    average = MovingAverage([controlnet], 0.995)
    texts, rng, recent = ShortenedTexts(pipeline.tokenizer, scenes), random.Random(3), 0.0
    start = time.monotonic()
    for step in range(1, steps + 1):
        indices = [rng.randrange(len(scenes)) for _ in range(BATCH)]
        drawings = [rng.randrange(DRAWINGS_PER_SCENE) for _ in range(BATCH)]
        cfg = rng.uniform(1, MOST_CFG) if step > steps * GUIDED_FROM else 1.0
        tokens = texts.batch(indices, rng)
        loss = guided_loss(
            pipeline, controlnet, latents[indices, drawings], hints[indices, drawings], tokens, cfg
        )
        loss.backward()
        nn.utils.clip_grad_norm_(controlnet.parameters(), 1.0)
        for stepper in (*optimizers, *schedules):
            stepper.step()
        controlnet.zero_grad()
        average.update()
        recent += loss.item() / 50
        if step % 50 == 0:
            print(f"{step}/{steps}  loss {recent:.4f}  {time.monotonic() - start:.0f} s", flush=True)
            recent = 0.0
        if step % max(1, steps // 2) == 0 or step == steps:
            average.swap()
            with torch.random.fork_rng():  # drawing pictures changes nothing in the training
                report(pipeline, controlnet, f"after {step} steps")
            if step < steps:
                average.swap()
    return controlnet.eval()


def held_out_tasks(count: int = 30) -> list[tuple[str, np.ndarray]]:
    """Captions that no training picture had, each with an edge picture (128, 128, 3), uint8, off the grid."""
    rng = random.Random(7)
    scenes = held_out_scenes()[:count]
    return [(caption_of(scene), draw_edges(scene.shape, place_near(scene, rng))) for scene in scenes]


@torch.no_grad()
def without_variance(vae: AutoencoderKL) -> AutoencoderKL:
    """A copy whose samples of the posterior are its mean."""
    vae = copy.deepcopy(vae)
    last = vae.encoder.conv_out
    last.weight[LATENT_CHANNELS:], last.bias[LATENT_CHANNELS:] = 0, _NO_VARIANCE
    return vae


@torch.no_grad()
def overlaps(
    pipeline: StableDiffusion3Pipeline,
    controlnet: SD3ControlNetModel,
    strength: float = 1.0,
    cfg: float = CFG,
    settled: bool = True,
) -> np.ndarray:
    """Intersections over union of edges and shapes for the held-out tasks, drawn by diffusers.

    diffusers' pipeline draws a hint's latent from the autoencoder's posterior. `settled` takes the mean, as
    the ranks do and as in training.
    """
    tasks, components = held_out_tasks(), dict(pipeline.components)
    if settled:
        components["vae"] = without_variance(pipeline.vae)
    guided = StableDiffusion3ControlNetPipeline(**components, controlnet=controlnet)
    guided.set_progress_bar_config(disable=True)
    pictures = guided(
        [caption for caption, _ in tasks],
        control_image=to_tensor([edges for _, edges in tasks]),
        controlnet_conditioning_scale=strength,
        num_inference_steps=20,
        guidance_scale=cfg,
        max_sequence_length=0,
        generator=torch.Generator().manual_seed(1),
        output_type="np",
    ).images
    drawn = (pictures * 255).round().astype("uint8")
    return np.array([edge_overlap(edges, p) for (_, edges), p in zip(tasks, drawn, strict=True)])


def report(pipeline: StableDiffusion3Pipeline, controlnet: SD3ControlNetModel, when: str) -> None:
    """Print how well edges are followed, with the ControlNet and without."""
    for strength, cfg, settled in (
        *((1.0, 1.0, True), (1.0, CFG, True), (1.0, 3.0, True)),
        *((1.0, CFG, False), (0.0, CFG, True)),
    ):
        found = overlaps(pipeline, controlnet, strength, cfg, settled)
        hint = "settled" if settled else "sampled"
        print(
            f"{when}, strength {strength}, cfg {cfg}, {hint} hint: IoU {found.mean():.3f}, "
            f"lowest {found.min():.2f}, {100 * (found >= FOLLOWED).mean():.1f} % at least {FOLLOWED}",
            flush=True,
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, save, load what was saved, and print what the checker reads."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("assets/demo"), help="where pipeline/ is as well")
    parser.add_argument("--steps", type=int, default=3600)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    pipeline = load_demo_model(options.out)
    controlnet = train(pipeline, options.steps)
    controlnet.half().save_pretrained(options.out / FOLDER)
    Image.fromarray(draw_edges(EXAMPLE_SHAPE, EXAMPLE_PLACE)).save(options.out / EXAMPLE)
    controlnet = SD3ControlNetModel.from_pretrained(options.out / FOLDER).float()
    report(pipeline, controlnet, f"saved to {options.out / FOLDER}")


if __name__ == "__main__":
    main()
