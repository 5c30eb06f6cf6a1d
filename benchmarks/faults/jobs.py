"""What the ranks are asked to do between faults: a tiny SD3 drawn from, and a tiny VAE."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from comfy_xdit.protocol.messages import Decode, Forget, Load, Progress, Sample
from comfy_xdit.protocol.spec import ModelSpec
from comfy_xdit.ranks.group import WorkerGroup
from tests import tiny, vaes
from worker.models.sd3.family import SD3

STEPS, MANY_STEPS = 8, 2000  # of a job; of one that a fault ends
SIDE, TEXT = 16, 8  # latent pixels, tokens
EXPECTED = "expected.pt"  # beside the models: what the first ranks drew


def write_models(folder: Path) -> None:
    """The models of `Jobs`, and another with the same names and shapes."""
    for name, seed in (("model", 0), ("other", 1)):
        module = tiny.build(SD3(), tiny.SD3_CONFIG, seed)
        tiny.write_native(SD3(), module, tiny.SD3_CONFIG, folder / f"{name}.safetensors")
    vaes.build("AutoencoderKL").save_pretrained(folder / "vae")


class Jobs:
    """Messages about the models in `folder`, and what the ranks answered the first time."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.model = ModelSpec.of(folder / "model.safetensors", "transformer")
        self._vae = ModelSpec.of(folder / "vae", "vae")
        self._noise = torch.randn(1, 16, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
        self._given = tiny.conditions(SD3(), tiny.SD3_CONFIG, TEXT)

    def sample(self, steps: int = STEPS, spec: ModelSpec | None = None) -> Sample:
        """A loop."""
        sigmas = torch.linspace(1.0, 0.0, steps + 1)
        return Sample(
            spec or self.model, "euler", sigmas, self._noise * 0, self._noise, 1.0, self._given, None,
            sigmas * 1000, previews=True,
        )  # fmt: skip

    def do(
        self,
        group: WorkerGroup,
        word: str,
        on_progress: Callable[[Progress], None] | None = None,
        interrupted: Callable[[], bool] | None = None,
    ) -> Any:
        """Have a Load, Sample or Decode done that takes as long as a fault in it needs."""
        if word == "Load":
            group.call(Forget())
        messages = {
            "Load": Load(self.model),
            "Sample": self.sample(MANY_STEPS),
            "Decode": Decode(self._vae, self._noise),
        }
        return group.call(messages[word], on_progress=on_progress, interrupted=interrupted).value

    def draw(self, group: WorkerGroup) -> list[torch.Tensor]:
        """Every kind of work once: what a job gives."""
        group.call(Load(self.model))
        return [group.call(self.sample()).value, group.call(Decode(self._vae, self._noise)).value["pixels"]]


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    """Bit by bit."""
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
