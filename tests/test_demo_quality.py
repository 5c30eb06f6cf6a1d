"""The shipped demo model draws what the prompt says: 50 captions it was never trained on, read back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from check_demo_pictures import held_out_captions, score

from comfy_xdit.headless.surroundings import HEADLESS
from comfy_xdit.nodes.lora import add_lora
from comfy_xdit.protocol.messages import AppliedControlNet, Sample
from comfy_xdit.protocol.parallel import ParallelConfig
from comfy_xdit.protocol.spec import ControlNet, ModelSpec
from comfy_xdit.remote.model import RemoteModel
from comfy_xdit.remote.schedulers import sigmas_of
from comfy_xdit.remote.text import RemoteTextEncoders
from comfy_xdit.remote.vae import RemoteVAE

PIPELINE = Path(__file__).parent.parent / "assets" / "demo" / "pipeline"
BATCH, STEPS, CFG, SEED = 25, 20, 3.0, 1
LAYOUTS = {
    "one rank": ParallelConfig(),
    "ulysses 2": ParallelConfig(ulysses_degree=2),
    "cfg 2": ParallelConfig(cfg_parallel_degree=2),
}


def draw(
    captions: list[str],
    parallel: ParallelConfig,
    lora: str | None = None,
    net: str | None = None,
    hints: list[np.ndarray] | None = None,
    cfg: float = CFG,
) -> list[np.ndarray]:
    """Pictures (H, W, 3), uint8, of all captions; with the LoRA and the ControlNet named, at strength 1.

    Args:
        hints: (H, W, 3), uint8, one per caption, for the ControlNet.
    """
    model, text, vae = (
        handle(ModelSpec.of(PIPELINE, kind), parallel)
        for handle, kind in (
            (RemoteModel, "transformer"), (RemoteTextEncoders, "text_encoders"), (RemoteVAE, "vae"),
        )
    )  # fmt: skip
    described = model.described()
    if lora is not None:
        model, _ = add_lora(model, lora, 1.0, HEADLESS)
    sampling = described.sampling

    def conditions(prompts: list[str]) -> dict[str, torch.Tensor]:
        encoded = [text.encode({name: [[(p, 1.0)]] for name in ("l", "g")}) for p in prompts]
        return {"context": torch.cat([c for c, _, _ in encoded]), "y": torch.cat([p for _, p, _ in encoded])}

    def nets(start: int) -> tuple[AppliedControlNet, ...]:
        if net is None:
            return ()
        part = torch.from_numpy(np.stack(hints[start : start + BATCH])).float() / 255
        return (AppliedControlNet(ControlNet.of(HEADLESS.path("controlnet", net)), vae.encode(part), 1.0),)

    pictures = []
    for start in range(0, len(captions), BATCH):
        part, control = captions[start : start + BATCH], nets(start)
        noise = torch.randn(len(part), 16, 16, 16, generator=torch.Generator().manual_seed(SEED + start))
        sigmas = sigmas_of(sampling, "simple", STEPS, 1.0)
        request = Sample(
            spec=model.spec,
            sampler="euler",
            sigmas=sigmas,
            latent=torch.zeros_like(noise),
            noise=noise,
            cfg=cfg,
            positive=conditions(part),
            negative=conditions([""] * len(part)),
            timesteps=sampling.timesteps(sigmas),
            patches=model.patches,
            positive_nets=control,
            negative_nets=control,
        )
        latent = described.latent.unscaled(model.sample(request))
        pictures += list((vae.decode(latent) * 255).round().to(torch.uint8).numpy())
    return pictures


@pytest.mark.parametrize("layout", LAYOUTS)
def test_at_least_nine_of_ten_held_out_prompts_are_all_right(layout):
    captions = held_out_captions()
    assert len(captions) == 50
    result = score(captions, draw(captions, LAYOUTS[layout]))
    assert result.all_right >= 0.9, result
