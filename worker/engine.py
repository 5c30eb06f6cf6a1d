"""What this rank holds and does. The one owner of loaded models."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.messages import (
    AppliedControlNet,
    Check,
    CheckIPAdapter,
    CheckLora,
    Compare,
    Decode,
    Denoise,
    Encode,
    EncodeText,
    Forget,
    ImagePrompt,
    Keep,
    Known,
    Load,
    Preprocess,
    Prove,
    Sample,
    Status,
)
from comfy_xdit.protocol.spec import ControlNet, ModelSpec
from worker.loop import Run
from worker.models import nearest
from worker.parallel import Degrees, RankGroups
from worker.patches import PatchStore
from worker.sampling.loops import sample
from worker.store import ModelStore
from worker.text.encoders import TextEncoders
from worker.transformer import (
    Batch,
    FittedControlNet,
    Latents,
    LoadedTransformer,
    NetCall,
    NetSpec,
    Pictures,
    open_transformer,
    planned_classes,
    prove_class,
)
from worker.vae.vae import VAE

KINDS = ("transformer", "text_encoders", "vae")  # of a ModelSpec
Loaded = LoadedTransformer | TextEncoders | VAE


class Engine:
    """Loads what a message names, if it is not loaded already, and does what it asks."""

    def __init__(self, groups: RankGroups):
        self._groups = groups
        self._models = ModelStore(groups.device, groups.world_size, self._open_to_load)
        self._tensors: dict[int | str, torch.Tensor] = {}
        self._patches = PatchStore()

    def handlers(self) -> dict[type, Callable[[Any, Run], Any]]:
        """The method for each message type."""
        return {
            Load: self.load,
            Check: self.check,
            CheckLora: self.check_lora,
            CheckIPAdapter: self.check_ip_adapter,
            Prove: self.prove,
            Compare: self.compare,
            Denoise: self.denoise,
            Preprocess: self.preprocess,
            Sample: self.sample,
            EncodeText: self.encode_text,
            Decode: self.decode,
            Encode: self.encode,
            Forget: self.forget,
            Status: self.status,
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

    def check(self, message: Check, _run: Run) -> dict[str, Any] | None:
        """Open the spec, which finds everything that can be wrong with it, and let it go.

        Returns the description of a transformer: layouts are planned by it before any is loaded.
        """
        opened = self._open(message.spec, Degrees.of(message.parallel))
        return opened.describe() if message.spec.kind == "transformer" else None

    def check_lora(self, message: CheckLora, _run: Run) -> dict[str, Any]:
        """What a LoRA file would change; the model's header is enough where it is not loaded."""
        opened = self._models.get(message.spec) or self._open(message.spec, self._groups.degrees)
        return opened.loras.check(message.file)

    def check_ip_adapter(self, message: CheckIPAdapter, _run: Run) -> dict[str, Any]:
        """What an IP-Adapter file would add; the model's header is enough where it is not loaded."""
        opened = self._models.get(message.spec) or self._open(message.spec, self._groups.degrees)
        opened.require("an IP-Adapter")
        return opened.ip_adapters.check(message.file, message.shapes)

    def prove(self, message: Prove, _run: Run) -> Any:
        """What came of proving a class of ComfyUI's, or the names of all that have a plan."""
        if not message.name:
            return planned_classes()
        return [proof.plain() for proof in prove_class(message.name, message.comfyui, self._groups)]

    def compare(self, message: Compare, _run: Run) -> list[dict[str, Any]]:
        """The known models that a file looks like."""
        return nearest(Path(message.path), message.comfyui, self._groups.device)

    def denoise(self, message: Denoise, _run: Run) -> Latents | None:
        """One transformer call; the output goes to the host from rank 0 only."""
        self._patches.take(message.patches)
        for name in message.forget:
            self._tensors.pop(name, None)
        conditions = self._resolve(message.conditions)
        applied = tuple(replace(net, hint=self._resolve(net.hint)) for net in message.nets)
        transformer = self._require(message.spec)
        nets = self._nets(applied, message.spec, transformer)
        conditions = transformer.check(message.x, conditions, message.control, nets)
        prompts = tuple(replace(p, embeds=self._resolve(p.embeds)) for p in message.image_prompts)
        self._have_ip_adapters(message.spec, transformer, prompts)
        transformer.patch(message.patches.name, self._patches)
        pictures = None
        if prompts:
            negative = message.negative or [False] * len(message.x)
            pictures = Pictures.of(prompts, torch.tensor(negative, device=message.x.device))
        batch = Batch(message.x, message.timestep, conditions, message.control, nets, pictures)
        output = transformer.predict_batch(batch)
        outputs = [output] if isinstance(output, torch.Tensor) else output
        if not all(torch.isfinite(one).all() for one in outputs):  # the same on all ranks
            raise transformer.not_finite()
        return output if self._groups.rank == 0 else None

    def preprocess(self, message: Preprocess, _run: Run) -> Any:
        """A method of the transformer beside its forward; the answer goes to the host from rank 0 only."""
        self._patches.take(message.patches)
        transformer = self._require(message.spec)
        self._patch(transformer, message.patches.name)
        output = transformer.preprocess(message.method, message.args, message.kwargs)
        return output if self._groups.rank == 0 else None

    def sample(self, message: Sample, run: Run) -> torch.Tensor | None:
        """A whole sampling loop; the latent goes to the host from rank 0 only."""
        self._patches.take(message.patches)
        transformer = self._require(message.spec)
        if self._groups.pipeline is None:
            transformer.require("a whole sampling loop")
        sides = (message.negative_nets, message.positive_nets)
        nets = [self._nets(applied, message.spec, transformer) for applied in sides]
        self._have_ip_adapters(message.spec, transformer, message.image_prompts)
        self._patch(transformer, message.patches.name)
        latent = sample(message, transformer, self._groups, run, *nets)
        if self._groups.any(latent is not None and not torch.isfinite(latent).all()):
            raise transformer.not_finite()
        return latent if self._groups.rank == 0 else None

    def encode_text(self, message: EncodeText, _run: Run) -> dict[str, torch.Tensor | None]:
        """Encode a prompt in this rank."""
        return self._require(message.spec).encode(message.prompts)

    def decode(self, message: Decode, run: Run) -> dict[str, Any] | None:
        """Latents to pictures, by all ranks; they go to the host from rank 0 only."""
        return self._require(message.spec).decode(message.latent, message.tile, run)

    def encode(self, message: Encode, run: Run) -> dict[str, Any] | None:
        """Pictures to latents, by all ranks; they go to the host from rank 0 only."""
        return self._require(message.spec).encode(message.pixels, message.tile, run)

    def forget(self, message: Forget, _run: Run) -> None:
        """Let go of models, and of tensors that travelled before; or of everything."""
        for name in message.names:
            self._tensors.pop(name, None)
        if message.specs is None:
            self._tensors, self._patches = {}, PatchStore()
        self._models.drop(None if message.specs is None else self._with_nets(message.specs))

    def status(self, _message: Status, _run: Run) -> dict[str, Any]:
        """What this rank holds and how much memory it has."""
        kept = {
            "tensors": sum(tensor.nbytes for tensor in self._tensors.values()),
            "patches": self._patches.nbytes,
        }
        return self.report() | self._models.report() | kept | _memory(self._groups.device)

    def _have_ip_adapters(
        self, spec: ModelSpec, transformer: LoadedTransformer, prompts: Sequence[ImagePrompt]
    ) -> None:
        """Have the adapters of `prompts` in memory. Those of other runs stay while there is room."""
        if not prompts:
            return
        transformer.require("an IP-Adapter")
        adapters, files = transformer.ip_adapters, {prompt.file for prompt in prompts}
        for prompt in prompts:
            adapters.check_embeds(prompt.file, tuple(prompt.embeds.shape))
        missing = adapters.missing_bytes(files)
        if missing and not self._models.make_room(missing, keep=spec):
            adapters.drop_all_but(files)
        adapters.load(files)

    def _patch(self, transformer: LoadedTransformer, name: str) -> None:
        """Patch the weights of every stage, or none goes on: a patch may fit some stages only."""
        error: InvalidInput | None = None
        try:
            transformer.patch(name, self._patches)
        except InvalidInput as refused:
            error = refused
        if self._groups.any(error is not None):
            raise error or InvalidInput("another rank refused the patch")

    def _nets(
        self, applied: tuple[AppliedControlNet, ...], spec: ModelSpec, transformer: LoadedTransformer
    ) -> tuple[NetCall, ...]:
        """ControlNets of a call, loaded to fit the transformer."""
        if applied:
            transformer.require("a ControlNet")
        calls = []
        for one in applied:
            net = self._models.require(
                NetSpec(one.net, spec),
                lambda one=one: FittedControlNet(one.net, transformer, self._groups),
                keep=spec,
            )
            calls.append(NetCall.of(net, one))
        self._models.touch(spec)  # nothing may be let go of before it, if it is to be called
        return tuple(calls)

    def _with_nets(self, specs: tuple[ModelSpec | ControlNet, ...]) -> list[ModelSpec | NetSpec]:
        """What is loaded of some models and ControlNets. A model's ControlNets go with it."""
        return [
            kept
            for kept in self._models.specs
            if kept in specs or (isinstance(kept, NetSpec) and (kept.net in specs or kept.model in specs))
        ]

    def _require(self, spec: ModelSpec) -> Loaded:
        """The loaded model of this spec."""
        return self._models.require(spec)

    def _open_to_load(self, spec: ModelSpec) -> Loaded:
        """Opened on all ranks alike: what they find out together is found out before others make room."""
        opened = self._open(spec, self._groups.degrees)
        if spec.kind == "transformer":
            opened.prove()
        return opened

    def _open(self, spec: ModelSpec, degrees: Degrees) -> Loaded:
        if spec.kind not in KINDS:
            raise InvalidInput(f"{spec.kind!r} is nothing a rank loads; it loads {', '.join(KINDS)}.")
        spec.check()  # another file under the name would draw another picture
        if spec.kind == "transformer":
            return open_transformer(spec, self._groups, degrees)
        if spec.kind == "text_encoders":
            return TextEncoders(spec, self._groups.device)
        return VAE(spec, self._groups)

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


def _memory(device: torch.device) -> dict[str, int]:
    """Bytes: of this process in the machine's memory, and of this process and in all on its GPU.

    `allocated` is in tensors now, `peak` was at most since the last time somebody asked.
    """
    with open("/proc/self/statm", encoding="ascii") as pages:
        resident = int(pages.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    if device.type != "cuda":
        return {"resident": resident}
    free, total = torch.cuda.mem_get_info(device)
    found = {
        "resident": resident,
        "gpu": torch.cuda.memory_reserved(device),
        "allocated": torch.cuda.memory_allocated(device),
        "peak": torch.cuda.max_memory_allocated(device),
        "free": free,
        "total": total,
    }
    torch.cuda.reset_peak_memory_stats(device)
    return found
