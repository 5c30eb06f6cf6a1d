"""What this rank holds and does. The one owner of loaded models."""

from __future__ import annotations

import os
import platform
from collections import OrderedDict
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch

from comfy_xdit.errors import InvalidInput
from comfy_xdit.messages import Check, Decode, Denoise, Encode, EncodeText, Keep, Known, Load, Sample
from comfy_xdit.spec import ModelSpec
from worker.batch import Batch
from worker.loop import Run
from worker.parallel import Degrees, RankGroups
from worker.patching import PatchStore
from worker.sampling import sample
from worker.text import TextEncoders
from worker.transformer import Transformer
from worker.vae import VAE

Loaded = Transformer | TextEncoders | VAE
# One of each kind stays; switching between two graphs reloads from the page cache.
KEPT_PER_KIND = 1


class Engine:
    """Loads what a message names, if it is not loaded already, and does what it asks."""

    def __init__(self, groups: RankGroups):
        self._groups = groups
        self._loaded: OrderedDict[ModelSpec, Loaded] = OrderedDict()
        self._tensors: dict[int | str, torch.Tensor] = {}
        self._patches = PatchStore()

    def handlers(self) -> dict[type, Callable[[Any, Run], Any]]:
        """The method for each message type."""
        return {
            Load: self.load,
            Check: self.check,
            Denoise: self.denoise,
            Sample: self.sample,
            EncodeText: self.encode_text,
            Decode: self.decode,
            Encode: self.encode,
        }

    def report(self) -> dict[str, Any]:
        """What this rank runs on."""
        device = self._groups.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"
        return {
            "rank": self._groups.rank,
            "pid": os.getpid(),
            "device": name,
            "torch": torch.__version__,
            "xfuser": version("xfuser"),
            "diffusers": version("diffusers"),
        }

    def load(self, message: Load, _run: Run) -> dict[str, Any]:
        """Have the spec in memory; returns its description."""
        return self._require(message.spec).describe()

    def check(self, message: Check, _run: Run) -> None:
        """Open the spec, which finds everything that can be wrong with it, and let it go."""
        self._open(message.spec, Degrees.of(message.parallel))

    def denoise(self, message: Denoise, _run: Run) -> torch.Tensor | None:
        """One transformer call; the output goes to the host from rank 0 only."""
        self._patches.take(message.patches)
        for name in message.forget:
            self._tensors.pop(name, None)
        conditions = self._resolve(message.conditions)
        transformer = self._require(message.spec)
        conditions = transformer.check(message.x, conditions, message.control)
        transformer.patch(message.patches.name, self._patches)
        batch = Batch(message.x, message.timestep, conditions, message.control)
        output = transformer.predict_batch(batch)
        return output if self._groups.rank == 0 else None

    def sample(self, message: Sample, run: Run) -> torch.Tensor | None:
        """A whole sampling loop; the latent goes to the host from rank 0 only."""
        self._patches.take(message.patches)
        transformer = self._require(message.spec)
        transformer.patch(message.patches.name, self._patches)
        latent = sample(message, transformer, self._groups, run)
        return latent if self._groups.rank == 0 else None

    def encode_text(self, message: EncodeText, _run: Run) -> dict[str, torch.Tensor | None]:
        """Encode a prompt in this rank."""
        return self._require(message.spec).encode(message.prompts)

    def decode(self, message: Decode, _run: Run) -> torch.Tensor:
        """Latents to pictures in this rank."""
        return self._require(message.spec).decode(message.latent)

    def encode(self, message: Encode, _run: Run) -> torch.Tensor:
        """Pictures to latents in this rank."""
        return self._require(message.spec).encode(message.pixels)

    def _require(self, spec: ModelSpec) -> Loaded:
        """The loaded model of this spec.

        A file is checked before the model it replaces is let go, and read after: a bad file costs
        nothing that is loaded, and two models are never in memory at once.
        """
        if spec not in self._loaded:
            model = self._open(spec, self._groups.degrees)
            same_kind = [s for s in self._loaded if s.kind == spec.kind]
            for old in same_kind[: len(same_kind) + 1 - KEPT_PER_KIND]:
                del self._loaded[old]
            if self._groups.device.type == "cuda":
                torch.cuda.empty_cache()
            model.load()
            self._loaded[spec] = model
        return self._loaded[spec]

    def _open(self, spec: ModelSpec, degrees: Degrees) -> Loaded:
        if spec.kind == "transformer":
            return Transformer(spec, self._groups, degrees)
        if spec.kind == "text_encoders":
            return TextEncoders(spec, self._groups.device)
        if spec.kind == "vae":
            return VAE(spec, self._groups.device)
        raise InvalidInput(f"{spec.kind!r} is nothing a rank loads")

    def _resolve(self, value: Any) -> Any:
        """Put tensors that travelled before in their places, and keep those named now."""
        if isinstance(value, Keep):
            self._tensors[value.name] = value.tensor
            return value.tensor
        if isinstance(value, Known):
            return self._tensors[value.name]
        if isinstance(value, dict):
            return {k: self._resolve(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self._resolve(v) for v in value)
        return value
