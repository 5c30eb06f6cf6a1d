"""Light handles for what runs in the ranks: a diffusion model, text encoders, a VAE.

A handle owns nothing: it names a spec and a layout, and sends messages to the group of that
layout. Every message carries the spec, so a group that was restarted loads again by itself.
"""

from __future__ import annotations

import itertools
import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from comfy_xdit.planning.calls import Calls
from comfy_xdit.protocol.errors import Interrupted, InvalidInput, RemoteError
from comfy_xdit.protocol.messages import (
    NO_PATCHES,
    AppliedControlNet,
    Check,
    CheckIPAdapter,
    CheckLora,
    Decode,
    Denoise,
    Encode,
    EncodeText,
    ImagePrompt,
    Keep,
    Known,
    Load,
    PatchSet,
    Progress,
    Result,
    Sample,
)
from comfy_xdit.protocol.parallel import ParallelConfig, available_devices
from comfy_xdit.protocol.spec import IPAdapterFile, LoraFile, ModelSpec
from comfy_xdit.ranks.group import holders, running_groups, worker_group
from comfy_xdit.remote.ip_adapter import PicturePrompt, check_files, refuse_stages
from comfy_xdit.remote.patches import SentPatches

Interrupt = Callable[[], bool]
# Smaller tensors cost less to send than to compare.
REMEMBERED_BYTES = 4096
REMEMBERED_TENSORS = 16
RETRY_TILES = (512, 256)  # pixels: the first one at most half of what a rank could not do
# Beside the conditions, so that all are remembered alike.
_HINTS, _EMBEDS = "hints of ControlNets", "encoded pictures"
_names = itertools.count(1)
_log = logging.getLogger(__name__)
# Of all handles of a layout: its ranks hold one store of patch sets, named by content.
_sent_patches: defaultdict[ParallelConfig, SentPatches] = defaultdict(SentPatches)


class SentTensors:
    """Which tensors the ranks already hold: compared by content, so never stale."""

    def __init__(self) -> None:
        self._generation = -1
        self._held: dict[int, torch.Tensor] = {}
        self._forget: list[int] = []

    def refer(self, conditions: dict[str, Any], generation: int) -> dict[str, Any]:
        """`conditions` with each large tensor replaced by Known, or by Keep the first time."""
        if generation != self._generation:  # new processes hold nothing
            self._generation, self._held, self._forget = generation, {}, []
        return {name: self._refer(value) for name, value in conditions.items()}

    def take_forgotten(self) -> tuple[int, ...]:
        """Names the ranks may drop, oldest first; asked once per message."""
        while len(self._held) > REMEMBERED_TENSORS:
            oldest = next(iter(self._held))
            del self._held[oldest]
            self._forget.append(oldest)
        forgotten, self._forget = tuple(self._forget), []
        return forgotten

    def names(self) -> tuple[int | str, ...]:
        """Every name the ranks may hold a tensor under."""
        return (*self._held, *self._forget)

    def reset(self) -> None:
        """After a failed call nobody knows what arrived: send everything anew."""
        self._forget += list(self._held)
        self._held = {}

    def _refer(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._refer(v) for v in value]
        if isinstance(value, tuple):
            return tuple(self._refer(v) for v in value)
        if isinstance(value, dict):
            return {k: self._refer(v) for k, v in value.items()}
        if not isinstance(value, torch.Tensor) or value.nbytes < REMEMBERED_BYTES:
            return value
        for name, held in self._held.items():
            if (
                held.shape == value.shape
                and held.dtype == value.dtype
                and held.device == value.device
                and torch.equal(held, value)
            ):
                self._held[name] = self._held.pop(name)  # most recently used last
                return Known(name)
        name = next(_names)
        self._held[name] = value.clone()  # the caller may write into its tensor later
        return Keep(name, value)


@dataclass
class Remote:
    """What all handles share. A model stays in the ranks while it has a handle, and a while longer."""

    spec: ModelSpec
    parallel: ParallelConfig
    info: dict[str, Any] = field(default_factory=dict)
    ranks = None  # all of them
    sent = None
    _is_held = False

    def load(self, interrupted: Interrupt | None = None) -> dict[str, Any]:
        """Have the spec loaded; fills and returns `info` (`describe` of what the ranks loaded).

        A group of another layout would have to go first. It is asked whether the spec is any good
        under the new layout: a bad file or degree never costs a running group.
        """
        parallel = self.parallel.check(available_devices())
        for group in running_groups():
            if group.parallel != parallel and group.pids:
                group.call(Check(self.spec, parallel), ranks=(0,), interrupted=interrupted)
        self.info = self._call(Load(self.spec), interrupted=interrupted).value
        return self.info

    def _call(self, message: Any, only: tuple[int, ...] | None = None, **options: Any) -> Result:
        group = worker_group(self.parallel)
        if not self._is_held:
            holders.hold(self, group.parallel, self.spec, self.sent)
            self._is_held = True
        return group.call(message, ranks=only or self.ranks, **options)


@dataclass
class RemoteModel(Remote):
    """A diffusion transformer in the ranks. `patches` are those of its weights in `denoise`.

    `pictures` prompt it where the handle itself is the MODEL, without ComfyUI.
    """

    sent: SentTensors = field(default_factory=SentTensors, repr=False)
    patches: PatchSet = field(default=NO_PATCHES, repr=False)
    pictures: tuple[PicturePrompt, ...] = field(default=(), repr=False)
    calls: Calls = field(default_factory=Calls, repr=False)

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
        x: torch.Tensor,
        timestep: torch.Tensor,
        conditions: dict[str, Any],
        interrupted: Interrupt | None = None,
        control: dict[str, list[torch.Tensor | None]] | None = None,
        nets: tuple[AppliedControlNet, ...] = (),
        image_prompts: Sequence[ImagePrompt] = (),
        negative: Sequence[bool] = (),
    ) -> torch.Tensor:
        """One transformer call with ComfyUI's arguments.

        Args:
            x: (B, C, H, W) latent as the transformer expects it.
            timestep: (B,) as ComfyUI hands it to the transformer.
            conditions: keyword arguments (context, y, guidance ...).
            control: residuals of ControlNets, one list per place (see `Denoise`).
            nets: ControlNets that the ranks run; a hint travels once, as a condition does.
            image_prompts, negative: pictures that act, and which rows do not see them.

        Returns:
            The output, (B, C, H, W), on CPU.

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
            patches = _sent_patches[self.parallel].refer(self.patches, generation)
            forget = self.sent.take_forgotten()
            return Denoise(
                self.spec, x, timestep, referred, forget, control, patches, hinted, pictures, tuple(negative)
            )

        try:
            output = self._call(message, interrupted=interrupted).value
        except BaseException:
            self.sent.reset()
            _sent_patches[self.parallel].reset()
            raise
        if control is None and not nets and not image_prompts and "ref_latents" not in conditions:
            self._note(Denoise, x)
        return output

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
            patches = _sent_patches[self.parallel].refer(request.patches, generation)
            return replace(request, patches=patches, warmup_steps=self.parallel.warmup_steps)

        try:
            latent = self._call(message, on_progress=on_progress, interrupted=interrupted).value
        except Interrupted:  # at a step boundary: everything had arrived
            raise
        except BaseException:
            _sent_patches[self.parallel].reset()
            raise
        added = request.positive_nets or request.negative_nets or request.image_prompts
        if "ref_latents" not in request.positive and not added:
            steps = len(request.sigmas) - 1
            self._note(Sample, request.latent, request.negative is not None, request.sampler, steps)
        return latent

    def _note(self, word: type, latent: torch.Tensor, *loop: Any) -> None:
        """The last call of this kind teaches the planner."""
        group = worker_group(self.parallel)
        timing = group.timings.get(word.__name__)
        self.calls.note(self.info, group.parallel, timing, tuple(latent.shape), *loop)


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


@dataclass
class RemoteTextEncoders(Remote):
    """The text encoders of a pipeline, in rank 0."""

    ranks = (0,)

    def encode(
        self, prompts: dict[str, list[list[tuple[str, float]]]], interrupted: Interrupt | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Encode chunks of (text, weight) per encoder (l, g, t5xxl).

        Returns:
            context (1, T, D) and pooled (1, P), fp32 on CPU.
        """
        value = self._call(EncodeText(self.spec, prompts), interrupted=interrupted).value
        return value["cond"], value["pooled"]


@dataclass
class RemoteVAE(Remote):
    """A VAE over all ranks. `note` says what was special about the last call; mostly nothing."""

    note: str = field(default="", compare=False)

    def decode(
        self, latent: torch.Tensor, interrupted: Interrupt | None = None, tile: int = 0
    ) -> torch.Tensor:
        """Unscaled latents, as in a LATENT socket, to pictures in 0..1.

        Args:
            latent: (B, C, H, W), or (B, C, T, H, W) of a VAE for videos.
            interrupted: asked whether the person wants to stop.
            tile: edge of tiles in pixels; 0 is the whole picture at once, and tiles only if the
                ranks run out of memory.

        Returns:
            (B, H * 8, W * 8, 3) or (B, T, H * 8, W * 8, 3), fp32 on CPU; 8 is the VAE's compression.
        """
        pixels = self.decode_unclamped(latent, interrupted, tile)
        return ((pixels + 1.0) / 2.0).clamp(0.0, 1.0).movedim(1, -1).contiguous()

    def decode_unclamped(
        self, latent: torch.Tensor, interrupted: Interrupt | None = None, tile: int = 0
    ) -> torch.Tensor:
        """As `decode`, but (B, 3, [T,] H, W) and about -1..1: what the network gives."""
        ratio = self._ratio(interrupted)
        sides = [side * ratio for side in latent.shape[-2:]]
        return self._tiled_if_needed(Decode(self.spec, latent, tile), sides, interrupted)["pixels"]

    def encode(
        self, pixels: torch.Tensor, interrupted: Interrupt | None = None, tile: int = 0
    ) -> torch.Tensor:
        """Pictures (B, [T,] H, W, 3) in 0..1 to unscaled latents (B, C, [T,] H / 8, W / 8)."""
        scaled = pixels[..., :3].movedim(-1, 1).float() * 2.0 - 1.0
        return self.encode_scaled(scaled, interrupted, tile)

    def encode_scaled(
        self, pixels: torch.Tensor, interrupted: Interrupt | None = None, tile: int = 0
    ) -> torch.Tensor:
        """As `encode`, of (B, 3, [T,] H, W) in -1..1: what the network takes."""
        message = Encode(self.spec, pixels.contiguous(), tile)
        return self._tiled_if_needed(message, pixels.shape[-2:], interrupted)["latent"]

    @property
    def ratio(self) -> int:
        """Pixels per latent pixel."""
        return self._ratio(None)

    @property
    def _world_size(self) -> int:
        return self.parallel.check(available_devices()).world_size

    def _ratio(self, interrupted: Interrupt | None) -> int:
        return (self.info or self.load(interrupted))["spatial_compression"]

    def _tiled_if_needed(
        self, message: Decode | Encode, sides: Sequence[int], interrupted: Interrupt | None
    ) -> dict[str, Any]:
        """The ranks' answer; if they run out of memory, once more in tiles, and `note` says so.

        Args:
            sides: height and width in pixels.
        """
        self.note = ""
        try:
            value = self._call(message, interrupted=interrupted).value
        except RemoteError as error:
            if not error.out_of_memory or message.tile:
                raise
            share = sides[0] * sides[1] / self._world_size
            tile = next((size for size in RETRY_TILES if 2 * size**2 <= share), RETRY_TILES[-1])
            self.note = (
                f"rank {error.rank} ran out of memory with the whole picture, so it was done in tiles of "
                f"{tile} pixels, which differ a little at their seams. More ranks, or a smaller picture, "
                "avoid that."
            )
            _log.warning("comfy_xdit: %s", self.note)
            return self._call(replace(message, tile=tile), interrupted=interrupted).value
        self.note = self._about_ranks(value["ranks"], sides[0] // self._ratio(interrupted))
        return value

    def _about_ranks(self, worked: int, rows: int) -> str:
        """A sentence if some ranks had nothing to do."""
        ranks = self._world_size
        if worked == ranks:
            return ""
        why = (
            f"the latent has {rows} rows, one for each rank are needed"
            if rows < ranks
            else f"this work of an {self.info['family']} cannot be spread; decoding in tiles can"
        )
        return f"{worked} of {ranks} ranks did the work: {why}."
