"""ControlNets in the ranks: loaded for one transformer, run on the tokens that each rank has of it.

A ControlNet is split as the transformer is: the same hooks, the same attention. Its residuals are then
on the rank's own tokens already, and nothing is gathered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import init_empty_weights
from torch import nn

from comfy_xdit.protocol.controlnet_files import ControlNetKind, kind_of
from comfy_xdit.protocol.description import LatentSpace
from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.messages import AppliedControlNet, Residuals
from comfy_xdit.protocol.spec import ControlNet, ModelSpec
from worker.checkpoints import Checkpoint, Shapes, check_complete, read_json
from worker.models import CONTROLNETS, ControlNetFamily, ModelFamily, to_whole_patches
from worker.parallel import RankGroups, SpreadTokens, ring_kernel

HINT_CONDITIONS = ("context", "y", "guidance")  # what a ControlNet reads of a call's conditions
# What must be as in the transformer, and what to call it.
FITS = {
    "in_channels": "takes latents of {} numbers per token or pixel",
    "joint_attention_dim": "takes prompts {} wide",
    "pooled_projection_dim": "takes pooled prompts {} wide",
}


@dataclass(frozen=True)
class NetSpec:
    """What a rank keeps a ControlNet under: it is made to fit one transformer, in its dtype."""

    net: ControlNet
    model: ModelSpec
    kind = "controlnet"

    @property
    def path(self) -> str:
        """Where it is on disk."""
        return self.net.path


class Model(Protocol):
    """What a ControlNet asks of the transformer that it is to fit."""

    family: ModelFamily
    config: dict[str, Any]
    latent: LatentSpace
    module: nn.Module
    dtype: torch.dtype


class FittedControlNet:
    """A ControlNet on this rank's device, beside a transformer.

    Raises:
        InvalidInput: no ControlNet that the ranks run, incomplete, or made for another model.
    """

    def __init__(self, spec: ControlNet, transformer: Model, groups: RankGroups):
        self.name, self._groups, self.dtype = spec.name, groups, transformer.dtype
        self._family, self._latent = transformer.family, transformer.latent
        if groups.degrees.stages > 1:
            raise InvalidInput(
                f"{self.name}: a ControlNet's residuals are for the whole picture at one step, and under "
                "PipeFusion patches of several steps are on their way at once; set pipefusion_degree to 1, "
                "and ulysses_degree instead."
            )
        spec.check()
        path = Path(spec.path)
        self._checkpoint = Checkpoint.at(path)
        shapes = self._checkpoint.shapes
        self.kind = kind_of(shapes, self.name)
        if self.kind.family != transformer.family.name:
            raise InvalidInput(
                f"{self.name} is a ControlNet for {self.kind.family}, the MODEL is "
                f"{transformer.family.name}; choose a ControlNet for {transformer.family.name}."
            )
        self._rules: ControlNetFamily = CONTROLNETS[self.kind.family]
        self.config = _config(self._rules, shapes, self.kind, path, self.name)
        _check_fit(self.name, self.config, transformer.config, groups)
        with init_empty_weights():
            self.module = self._rules.build(self.config)
        self._mapping = self._rules.mapping(shapes, self.kind, self.config)
        check_complete(self.module, self._mapping, self._checkpoint, self.name)
        self._blocks = {
            place: len(transformer.module.get_submodule(blocks))
            for place, blocks in transformer.family.control.items()
        }
        self._tokens: SpreadTokens | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of its weights: whole in every rank."""
        return sum(p.numel() for p in self.module.parameters()) * self.dtype.itemsize

    def load(self) -> None:
        """Read the weights.

        Raises:
            InvalidInput: some are not finite.
        """
        mapping = {name: self._mapping[name] for name in self.module.state_dict()}
        tensors = self._checkpoint.tensors(mapping, self.dtype, self._groups.device)
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise InvalidInput(
                    f"{self.name}: {mapping[name].key} holds values that are not finite in {self.dtype} "
                    "(NaN or infinity); the file is damaged or needs another weight_dtype: choose another "
                    "one."
                )
        self.module.load_state_dict(tensors, assign=True)
        self.module.to(self._groups.device).eval().requires_grad_(False)
        self._family.prepare(self.module)
        if self._groups.degrees.sequence > 1:
            kernel = ring_kernel(self.module, self._groups)
            self._tokens = SpreadTokens(self.module, self._rules.plan, self._groups.mesh, kernel)

    def check(self, x: torch.Tensor, applied: NetCall) -> None:
        """Raise InvalidInput for a hint, or a type, that does not fit a call for `x` (B, C, H, W)."""
        if applied.mode is not None and not 0 <= applied.mode < self.kind.modes:
            raise InvalidInput(
                f"{self.name} has {self.kind.modes} control types, and type {applied.mode} is asked for; "
                "choose one of them, or none."
            )
        height, width = x.shape[-2:]
        wanted = x.shape[1:]
        if self.kind.takes == "pixels":
            wanted = torch.Size((3, *self._latent.whole_pixels(x.shape)))
        hint = applied.hint
        if hint.ndim != 4 or hint.shape[1:] != wanted or hint.shape[0] not in (1, x.shape[0]):
            raise InvalidInput(
                f"the hint for {self.name} has shape {tuple(hint.shape)}, it takes ({x.shape[0]} or 1, "
                f"{', '.join(map(str, wanted))}); use the VAE of this model, and one hint or one per picture."
            )
        if not torch.isfinite(hint).all():
            raise InvalidInput(
                f"the hint for {self.name} holds values that are not finite; check the picture."
            )
        positions = self.config.get("pos_embed_max_size")
        patch = self._latent.patch
        if positions is not None and max(to_whole_patches(x, patch).shape[-2:]) > positions * patch[-1]:
            pixels = self._latent.compression
            most = positions * patch[-1] * pixels
            raise InvalidInput(
                f"the picture is {width * pixels} x {height * pixels} pixels, and {self.name} has positions "
                f"for {most} x {most}; draw a smaller picture."
            )

    def residuals(
        self, x: torch.Tensor, timestep: torch.Tensor, conditions: dict[str, Any], applied: NetCall
    ) -> Residuals:
        """Residuals per block on this rank's part of the image tokens.

        Args:
            x: (B, C, H, W), padded to whole patches.
            conditions: ComfyUI's, of this call.
        """
        given = {name: conditions[name] for name in HINT_CONDITIONS if name in conditions}
        call = self._family.call(self.config, x, timestep, given)
        kwargs = self._rules.kwargs(self.module, call, self._hint(applied, x), applied.mode)
        outputs = self.module(**kwargs, conditioning_scale=applied.strength, return_dict=False)
        return self._rules.spread(outputs, self._blocks, self.module)

    def whole(self, residuals: Residuals) -> Residuals:
        """The same on all image tokens, of residuals that were computed last."""
        if self._tokens is None:
            return residuals
        found = {id(r): r for given in residuals.values() for r in given if r is not None}
        gathered = {key: self._tokens.whole(residual, "image") for key, residual in found.items()}
        return {
            place: [None if r is None else gathered[id(r)] for r in given]
            for place, given in residuals.items()
        }

    def _hint(self, applied: NetCall, x: torch.Tensor) -> torch.Tensor:
        hint = applied.hint.float()
        if self.kind.takes == "pixels":
            hint = hint * 2.0 - 1.0
        else:
            latent = self._latent
            # Whoever leaves the pooled prompt out leaves the shift of latents out as well.
            if self.config.get("force_zeros_for_pooled_projection"):
                latent = replace(latent, mean=())
            hint = to_whole_patches(latent.scaled(hint), latent.patch)
        return hint.to(self.dtype).expand(x.shape[0], -1, -1, -1)


@dataclass(frozen=True, eq=False)
class NetCall:
    """A ControlNet and what it is called with; see `messages.AppliedControlNet`."""

    net: FittedControlNet
    hint: torch.Tensor
    strength: float
    mode: int | None
    sigmas: tuple[float, float] | None

    @classmethod
    def of(cls, net: FittedControlNet, applied: AppliedControlNet) -> NetCall:
        """`applied`, whose tensors are in their places, with its net."""
        return cls(net, applied.hint, applied.strength, applied.mode, applied.sigmas)

    def acts_at(self, sigma: torch.Tensor) -> bool:
        """Whether it acts at a noise level, as ComfyUI compares them."""
        return self.sigmas is None or not bool(sigma > self.sigmas[0] or sigma < self.sigmas[1])

    def repeated(self, times: int) -> NetCall:
        """For a batch that holds the pictures so many times, one after the other."""
        return self if self.hint.shape[0] == 1 else replace(self, hint=torch.cat([self.hint] * times))

    def same_as(self, other: NetCall) -> bool:
        """Whether both say the same; hints that travelled as one tensor are one."""
        ours, theirs = ((n.strength, n.mode, n.sigmas) for n in (self, other))
        return self.net is other.net and self.hint is other.hint and ours == theirs


def same_nets(ours: Sequence[NetCall], theirs: Sequence[NetCall]) -> bool:
    """Whether two sides of guidance have the same ControlNets, so that they can be one batch."""
    return len(ours) == len(theirs) and all(a.same_as(b) for a, b in zip(ours, theirs, strict=True))


def summed(all_residuals: Sequence[Residuals]) -> Residuals:
    """The sum of the residuals of several ControlNets. A tensor of many blocks is added once."""
    if len(all_residuals) == 1:
        return all_residuals[0]
    sums: dict[tuple[int, int], torch.Tensor] = {}
    total: dict[str, list[torch.Tensor | None]] = {}
    for residuals in all_residuals:
        for place, given in residuals.items():
            before = total.get(place, [None] * len(given))
            total[place] = [_sum(a, b, sums) for a, b in zip(before, given, strict=True)]
    return total


def _sum(
    a: torch.Tensor | None, b: torch.Tensor | None, sums: dict[tuple[int, int], torch.Tensor]
) -> torch.Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    if (id(a), id(b)) not in sums:
        sums[id(a), id(b)] = a + b
    return sums[id(a), id(b)]


def _config(
    rules: ControlNetFamily, shapes: Shapes, kind: ControlNetKind, path: Path, name: str
) -> dict[str, Any]:
    try:
        config = rules.config(shapes, kind)
    except InvalidInput:
        raise
    except (KeyError, ValueError, IndexError, ArithmeticError) as error:
        raise InvalidInput(f"{name} lacks {error}; the file is incomplete: download it again.") from error
    if config["num_layers"] == 0:
        raise InvalidInput(f"{name} has no transformer block; the file is incomplete: download it again.")
    width = config["num_attention_heads"] * config["attention_head_dim"]
    stored = (path if path.is_dir() else path.parent) / "config.json"
    words = read_json(stored) if stored.is_file() else {}
    if words.get("_class_name") == rules.class_name:  # any other is for another file
        config |= {key: words[key] for key in rules.words if key in words}
        told = config["num_attention_heads"] * config["attention_head_dim"]
        if told != width:
            raise InvalidInput(
                f"{stored} says {config['num_attention_heads']} heads of {config['attention_head_dim']}, and "
                f"{name} is {width} wide; put the file's own config.json beside it, or remove it."
            )
    return config


def _check_fit(name: str, config: dict[str, Any], model: dict[str, Any], groups: RankGroups) -> None:
    """A ControlNet adds to the transformer's tokens, and reads what the transformer reads."""

    def refuse(what: str, ours: int, theirs: int) -> InvalidInput:
        return InvalidInput(
            f"{name} {what.format(ours)}, the MODEL {theirs}; choose a ControlNet made for this model."
        )

    ours, theirs = (c["num_attention_heads"] * c["attention_head_dim"] for c in (config, model))
    if ours != theirs:
        raise refuse("is {} wide", ours, theirs)
    for key, what in FITS.items():
        if config[key] != model[key]:
            raise refuse(what, config[key], model[key])
    for key in ("num_layers", "num_single_layers"):
        if config.get(key, 0) > model.get(key, 0):
            raise refuse(f"has {{}} blocks ({key})", config[key], model.get(key, 0))
