"""A loaded VAE: latents to pictures or videos and back, by all ranks."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn

from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.spec import ModelSpec
from worker.checkpoints import check_dtype, not_finite
from worker.loop import Run
from worker.parallel import RankGroups
from worker.store import give_back
from worker.vae.autoencoders import AUTOENCODERS, diffusers_class
from worker.vae.files import ASIDE, StoredVAE, find
from worker.vae.parallel import SpreadVAE


class VAE:
    """One of diffusers' autoencoders. Every rank holds it whole: weights of 0.2 to 2.8 GB."""

    def __init__(self, spec: ModelSpec, groups: RankGroups):
        self._stored, self._groups, self._path = find(Path(spec.path)), groups, spec.path
        cls = diffusers_class(self._stored.cls, spec.path)
        self._module = _without_weights(cls, self._stored, spec.path)
        self._shapes = _shapes(self._module)
        _check_complete(self._shapes, self._stored, spec.path)
        self._family = AUTOENCODERS[self._stored.cls]
        geometry = self._family.geometry(self._module)
        self.geometry = replace(geometry, temporal=1) if self._stored.of_frames else geometry
        self.dtype = _dtype(spec.weight_dtype, self._stored, groups.device)
        self.nbytes = sum(math.prod(shape) for shape in self._shapes.values()) * self.dtype.itemsize
        self._run: Run | None = None

    def load(self) -> None:
        """Read the weights. Everything that can be wrong with the file was checked before."""
        mapping = {name: self._stored.mapping[name] for name in self._shapes}
        read = self._stored.checkpoint.stream(mapping, self.dtype, self._groups.device)
        weights = {name: tensor.reshape(self._shapes[name]) for name, tensor in read}
        self._module.load_state_dict(weights, strict=False, assign=True)
        self._module.to(self._groups.device).eval().requires_grad_(False)
        self._family.prepare(self._module)
        self._spread = SpreadVAE(self._module, self.geometry.spatial, self._groups.everyone)
        self._spread.on_block(self._pause)

    def describe(self) -> dict[str, Any]:
        """What the host needs to know."""
        return {
            "family": self._stored.cls,
            "latent_channels": self.geometry.channels,
            "spatial_compression": self.geometry.spatial,
            "temporal_compression": self.geometry.temporal,
            "batch_is_video": self.geometry.batch_is_video,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def decode(self, latent: torch.Tensor, tile: int, run: Run) -> dict[str, Any] | None:
        """Unscaled latents (B, C, [T,] H, W) to pictures (B, 3, [T,] H, W), about -1..1, fp32.

        One after the other, so that a batch takes no more memory than one.

        Returns:
            On rank 0 {"pixels": ..., "ranks": how many worked}, None on the others.

        Raises:
            InvalidInput: not a latent of this VAE, or it holds values that are not finite.
        """
        geometry = self.geometry
        frames = "" if geometry.temporal is None else "frames, "
        if latent.ndim != geometry.dimensions or latent.shape[1] != geometry.channels:
            raise InvalidInput(
                f"the latent has shape {tuple(latent.shape)}, this VAE decodes (batch, {geometry.channels}, "
                f"{frames}height, width); use the VAE of the model that made the latent."
            )
        if latent.numel() == 0:
            raise InvalidInput(f"the latent of shape {tuple(latent.shape)} is empty; make it larger.")
        if not torch.isfinite(latent).all():
            raise InvalidInput(
                "the latent holds values that are not finite (NaN or infinity); check the sampler before."
            )

        def decode(one: torch.Tensor) -> torch.Tensor | None:
            decoded = self._spread.decode(self._family.to_decoder(self._module, one), tile)
            return None if decoded is None else self._family.to_pictures(decoded)

        pixels = self._each(latent, decode, run, tile)
        ranks = self._groups.world_size if tile else self._spread.ranks_for(latent.shape[-2])
        return None if pixels is None else {"pixels": pixels, "ranks": ranks}

    def encode(self, pixels: torch.Tensor, tile: int, run: Run) -> dict[str, Any] | None:
        """Pictures (B, 3, [T,] H, W) in -1..1 to unscaled latents: the posterior's mean, as ComfyUI takes.

        Returns:
            On rank 0 {"latent": ..., "ranks": how many worked}, None on the others.

        Raises:
            InvalidInput: no pictures, too small, or they hold values that are not finite.
        """
        step = self.geometry.spatial
        if pixels.ndim != self.geometry.dimensions or pixels.shape[1] != 3 or pixels.numel() == 0:
            raise InvalidInput(
                f"the pictures have shape {tuple(pixels.shape)}, the VAE encodes (batch, 3, "
                f"{'' if self.geometry.temporal is None else 'frames, '}height, width); connect an IMAGE."
            )
        if min(pixels.shape[-2:]) < step:
            raise InvalidInput(
                f"a picture of {pixels.shape[-1]} x {pixels.shape[-2]} pixels is smaller than one place of a "
                f"latent, {step} x {step}; use a larger one."
            )
        if not torch.isfinite(pixels).all():
            raise InvalidInput(
                "the picture holds values that are not finite (NaN or infinity); check the node that made it."
            )
        centre = _cropped(pixels, step)
        rows = centre.shape[-2] // step

        def encode(one: torch.Tensor) -> torch.Tensor | None:
            latent = self._spread.encode(one, tile, rows)
            return None if latent is None else self._family.to_socket(self._module, latent)

        latents, ranks = self._each(centre, encode, run, tile), 1 if tile else self._spread.ranks_for(rows)
        return None if latents is None else {"latent": latents, "ranks": ranks}

    def _each(self, batch: torch.Tensor, work: Any, run: Run, tile: int) -> torch.Tensor | None:
        frames = batch.shape[2] if self._stored.of_frames else 0
        if frames:
            batch = batch.movedim(2, 1).flatten(0, 1)
        if tile:  # memory was short, or is
            give_back(self._groups.device)
        done, self._run = [], run
        try:
            for number, one in enumerate(batch.to(self.dtype).split(1), 1):
                result = work(one.contiguous())
                run.step(number, len(batch))
                if self._groups.rank == 0:
                    done.append(result.float())
        finally:
            self._run = None
        result = torch.cat(done) if done else None
        if self._groups.any(result is not None and not torch.isfinite(result).all()):
            keys = [self._stored.mapping[name].key for name in self._shapes]
            raise not_finite(self._stored.checkpoint, keys, self.dtype, self._path)
        return result.unflatten(0, (-1, frames)).movedim(1, 2) if done and frames else result

    def _pause(self) -> None:
        if self._run is not None:
            self._run.pause()


def _without_weights(cls: type[nn.Module], stored: StoredVAE, path: str) -> nn.Module:
    try:
        with init_empty_weights():
            return cls.from_config(stored.config)
    except (TypeError, ValueError, KeyError, IndexError, ArithmeticError, RuntimeError) as error:
        raise InvalidInput(
            f"the configuration of the {stored.cls} in {path} is wrong: {error}; download the folder again."
        ) from error


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in module.state_dict().items() if not name.endswith(ASIDE)}


def _check_complete(shapes: dict[str, tuple[int, ...]], stored: StoredVAE, path: str) -> None:
    """Raise InvalidInput unless the file holds every tensor of the model, each of its size."""
    missing = sorted(shapes.keys() - stored.mapping.keys())
    if missing:
        raise InvalidInput(
            f"{path} lacks {len(missing)} of the {len(shapes)} tensors of {stored.cls}, {missing[0]} first; "
            "download it again, or use the stock VAE loader."
        )
    for name, shape in shapes.items():
        key = stored.mapping[name].key
        found = stored.checkpoint.shapes[key]
        # Original releases have convolutions of one place where diffusers has linear layers.
        if found != shape and not (
            ".attentions." in name and found == shape + (1,) * (len(found) - len(shape))
        ):
            raise InvalidInput(
                f"{name} in {path} has shape {found}, {stored.cls} has {shape}; choose a VAE of that family."
            )
        check_dtype(stored.checkpoint, key, path)


def _dtype(wanted: str, stored: StoredVAE, device: torch.device) -> torch.dtype:
    """fp32 on CPU; on a GPU as ComfyUI: bf16 for a file in half precision, never fp16, which overflows."""
    if device.type == "cpu" or wanted == "fp32":
        return torch.float32
    half = wanted in ("fp16", "bf16") or stored.checkpoint.common_dtype() != torch.float32
    return torch.bfloat16 if half else torch.float32


def _cropped(pixels: torch.Tensor, step: int) -> torch.Tensor:
    """The centre whose sides are multiples of `step`."""
    height, width = (side // step * step for side in pixels.shape[-2:])
    top, left = (pixels.shape[-2] - height) // 2, (pixels.shape[-1] - width) // 2
    return pixels[..., top : top + height, left : left + width]
