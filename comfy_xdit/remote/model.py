"""The handle of a diffusion transformer in the ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from comfy_xdit.planning.calls import Calls
from comfy_xdit.protocol.description import ModelDescription
from comfy_xdit.protocol.errors import Interrupted, InvalidInput
from comfy_xdit.protocol.messages import (
    NO_PATCHES,
    AppliedControlNet,
    CheckIPAdapter,
    CheckLora,
    Denoise,
    ImagePrompt,
    PatchSet,
    Preprocess,
    Progress,
    Sample,
)
from comfy_xdit.protocol.parallel import ParallelConfig, available_devices
from comfy_xdit.protocol.spec import IPAdapterFile, LoraFile
from comfy_xdit.ranks.registry import worker_group
from comfy_xdit.remote.base import Interrupt, Remote
from comfy_xdit.remote.ip_adapter import PicturePrompt, check_files, refuse_stages
from comfy_xdit.remote.sent import SentTensors, sent_patches

# Beside the conditions, so that all are remembered alike.
_HINTS, _EMBEDS = "hints of ControlNets", "encoded pictures"


@dataclass
class RemoteModel(Remote):
    """A diffusion transformer in the ranks. `patches` are those of its weights in `denoise`.

    `pictures` prompt it where the handle itself is the MODEL, without ComfyUI.
    """

    sent: SentTensors = field(default_factory=SentTensors, repr=False)
    patches: PatchSet = field(default=NO_PATCHES, repr=False)
    pictures: tuple[PicturePrompt, ...] = field(default=(), repr=False)
    calls: Calls = field(default_factory=Calls, repr=False)

    def described(self, interrupted: Interrupt | None = None) -> ModelDescription:
        """What the ranks say of the model; they load it if they have not yet."""
        return ModelDescription.of(self.info or self.load(interrupted))

    def check_lora(self, file: LoraFile, interrupted: Interrupt | None = None) -> dict[str, Any]:
        """What `file` changes of this model (see `CheckLora`); nothing is changed yet.

        Raises:
            InvalidInput: the file is damaged, or none for this model.
        """
        return self._call(CheckLora(self.spec, file), only=(0,), interrupted=interrupted).value

    def check_ip_adapter(
        self,
        file: IPAdapterFile,
        shapes: dict[str, tuple[int, ...]],
        interrupted: Interrupt | None = None,
    ) -> dict[str, Any]:
        """What `file` would add to this model (see `CheckIPAdapter`); nothing is added yet.

        Raises:
            InvalidInput: the file is damaged or none for this model, or the layout or the encoded
                picture does not fit.
        """
        refuse_stages(self.parallel)
        return self._call(CheckIPAdapter(self.spec, file, shapes), only=(0,), interrupted=interrupted).value

    def denoise(
        self,
        x: Any,
        timestep: Any,
        conditions: dict[str, Any],
        interrupted: Interrupt | None = None,
        control: dict[str, list[torch.Tensor | None]] | None = None,
        nets: tuple[AppliedControlNet, ...] = (),
        image_prompts: Sequence[ImagePrompt] = (),
        negative: Sequence[bool] = (),
    ) -> Any:
        """One transformer call with ComfyUI's arguments.

        Args:
            x: (B, C, H, W) latent as the transformer expects it; a class of ComfyUI's own may take several.
            timestep: (B,) as ComfyUI hands it to the transformer.
            conditions: keyword arguments (context, y, guidance ...).
            control: residuals of ControlNets, one list per place (see `Denoise`).
            nets: ControlNets that the ranks run; a hint travels once, as a condition does.
            image_prompts, negative: pictures that act, and which rows do not see them.

        Returns:
            The output, shaped like x, on CPU.

        Raises:
            InvalidInput: the layout is for whole sampling loops only.
        """
        _refuse_pipefusion(self.parallel, control or nets or None)
        check_files(image_prompts)

        def message(generation: int) -> Denoise:
            added = {_HINTS: [net.hint for net in nets], _EMBEDS: [p.embeds for p in image_prompts]}
            referred = self.sent.refer({**conditions, **added}, generation)
            hints, embeds = referred.pop(_HINTS), referred.pop(_EMBEDS)
            hinted = tuple(replace(net, hint=hint) for net, hint in zip(nets, hints, strict=True))
            pictures = tuple(replace(p, embeds=e) for p, e in zip(image_prompts, embeds, strict=True))
            patches = sent_patches[self.parallel].refer(self.patches, generation)
            forget = self.sent.take_forgotten()
            return Denoise(
                self.spec, x, timestep, referred, forget, control, patches, hinted, pictures, tuple(negative)
            )

        try:
            output = self._call(message, interrupted=interrupted, guess=self._guess(x)).value
        except BaseException:
            self.sent.reset()
            sent_patches[self.parallel].reset()
            raise
        if control is None and not nets and not image_prompts and "ref_latents" not in conditions:
            self._note(Denoise, x)
        return output

    def preprocess(
        self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], interrupted: Interrupt | None = None
    ) -> Any:
        """What a method of the transformer returns that ComfyUI calls around its forward; on CPU."""

        def message(generation: int) -> Preprocess:
            patches = sent_patches[self.parallel].refer(self.patches, generation)
            return Preprocess(self.spec, method, args, kwargs, patches)

        try:
            return self._call(message, interrupted=interrupted).value
        except BaseException:
            sent_patches[self.parallel].reset()
            raise

    def sample(
        self,
        request: Sample,
        on_progress: Callable[[Progress], None] | None = None,
        interrupted: Interrupt | None = None,
    ) -> torch.Tensor:
        """A whole sampling loop in the ranks; returns the last latent, scaled, on CPU."""
        if request.positive_nets or request.negative_nets:
            _refuse_pipefusion(self.parallel, request.positive_nets or request.negative_nets)

        if request.image_prompts:
            refuse_stages(self.parallel)
            check_files(request.image_prompts)

        def message(generation: int) -> Sample:
            patches = sent_patches[self.parallel].refer(request.patches, generation)
            return replace(request, patches=patches, warmup_steps=self.parallel.warmup_steps)

        steps = len(request.sigmas) - 1
        loop = (request.negative is not None, request.sampler, steps)
        guess = self._guess(request.latent, *loop)
        try:
            options = {"on_progress": on_progress, "interrupted": interrupted, "guess": guess}
            latent = self._call(message, **options).value
        except Interrupted:  # at a step boundary: everything had arrived
            raise
        except BaseException:
            sent_patches[self.parallel].reset()
            raise
        added = request.positive_nets or request.negative_nets or request.image_prompts
        if "ref_latents" not in request.positive and not added:
            self._note(Sample, request.latent, *loop)
        return latent

    def _note(self, word: type, latent: torch.Tensor, *loop: Any) -> None:
        """The last call of this kind teaches the planner."""
        described = self._timed()
        if described is None:
            return
        group = worker_group(self.parallel)
        timing = group.timings.get(word.__name__)
        self.calls.note(described, group.parallel, timing, tuple(latent.shape), *loop)

    def _guess(self, latent: torch.Tensor, *loop: Any) -> float | None:
        """Seconds that a step may take, where the planner knows."""
        described = self._timed()
        if described is None or not described.latent.fits(latent) or not latent.numel():
            return None  # what is wrong with such a latent the ranks say
        parallel = self.parallel.check(available_devices())
        return self.calls.guess(described, parallel, tuple(latent.shape), *loop)

    def _timed(self) -> ModelDescription | None:
        """The description, if the planner can tell a time from it."""
        if not self.info:  # of a handle that called without loading
            return None
        described = self.described()
        return None if described.comfyui else described  # of such a class the shape says nothing yet


def _refuse_pipefusion(parallel: ParallelConfig, control: Any) -> None:
    """Raise InvalidInput where single calls are asked of a group that holds the model in stages."""
    if parallel.pipefusion_degree == 1:
        return
    layout = f"pipefusion_degree {parallel.pipefusion_degree}"
    if control is not None:
        raise InvalidInput(
            "a ControlNet's residuals are for the whole picture at one step, and under PipeFusion "
            f"({layout}) patches of several steps are on their way at once; set pipefusion_degree to 1, and "
            "ulysses_degree instead."
        )
    raise InvalidInput(
        f"this sampler calls the transformer once per step, and PipeFusion ({layout}) runs the whole loop in "
        "the ranks, where steps overlap; use xDiT Sampler (XDiTSampler), or set pipefusion_degree to 1."
    )
