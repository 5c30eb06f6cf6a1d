"""One VAE over all ranks: in rows that exchange their edges (exact), or in tiles with blended seams.

The work is DistVAE's. Three structures share one set of weights: the whole VAE, one whose layers
know that they hold some rows of a picture, and one whose tiles are dealt out to the ranks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from distvae.utils import parallel_context
from distvae.vae import (
    apply_tile_plan,
    decoder_adapter_name,
    encoder_adapter_name,
    parallelize_decoder,
    parallelize_encoder,
    sharing,
    tile_shape_plan,
    tiled_decode_for,
)
from torch import nn

from comfy_xdit.errors import InvalidInput

HEIGHT = -2  # rows are along it
Coder = Callable[[torch.Tensor], torch.Tensor]


class SpreadVAE:
    """A diffusers VAE, and its decode and encode by all ranks of `group` (None: one rank).

    All ranks call the same method with the same tensor. Where only some have work, `None` comes
    back on the others; rank 0 always has the result.
    """

    def __init__(self, module: nn.Module, spatial: int, group: dist.ProcessGroup | None):
        self.whole, self._group = module, group
        self._ranks = 1 if group is None else dist.get_world_size(group)
        self._rank = 0 if group is None else dist.get_rank(group)
        self._tiled = _shared_copy(module)
        self._rows = None
        if group is None:
            return
        self._context = parallel_context(group, HEIGHT, ndim=4)
        dispatch, assemble = sharing(self._context)
        tiled_decode = tiled_decode_for(self._tiled, dispatch, assemble)
        if tiled_decode is not None:
            self._tiled.tiled_decode = tiled_decode
        if decoder_adapter_name(module) and encoder_adapter_name(module):
            self._rows = _shared_copy(module)
            # DistVAE takes 8 for what a configuration does not say; the truth depends on the file.
            self._rows.register_to_config(scale_factor_spatial=spatial)
            parallelize_decoder(self._rows, group)
            parallelize_encoder(self._rows, group)
            if hasattr(self._rows.decoder, "patchify"):
                # DistVAE cuts Wan 2.2's latent by its patch size, which rows of a decoder do not need.
                self._rows.decoder.patchify.scale_factor = 1

    def ranks_for(self, rows: int) -> int:
        """How many ranks decode or encode a picture of so many latent rows, when it is not tiled."""
        return self._ranks if self._rows is not None and rows >= self._ranks else 1

    def decode(self, latent: torch.Tensor, tile: int) -> torch.Tensor | None:
        """diffusers' decode of one latent; `tile` is the edge of a tile in pixels, 0 is no tiles."""
        if tile:
            with _tiles_of(self._tiled, tile):
                return self._decode_tiles(latent)
        coder = self._coder(latent.shape[HEIGHT])
        return None if coder is None else coder.decode(latent, return_dict=False)[0]

    def encode(self, pixels: torch.Tensor, tile: int, rows: int) -> torch.Tensor | None:
        """diffusers' encode of one picture or video of `rows` latent rows: the posterior's mean."""
        if not tile:
            coder = self._coder(rows)
            return None if coder is None else _mean(coder.encode(pixels))
        if self._rank > 0:  # nobody spreads the tiles of an encoder
            return None
        with _tiles_of(self._tiled, tile):
            return _mean(self._tiled.encode(pixels))

    def on_block(self, pause: Callable[[], None]) -> None:
        """Have `pause` called before every block of the network that all ranks come to together."""
        for name, blocks in (self._rows or self.whole).named_modules():
            if isinstance(blocks, nn.ModuleList) and name.endswith(("up_blocks", "down_blocks")):
                for block in blocks:
                    block.register_forward_pre_hook(lambda *_: pause())

    def _coder(self, rows: int) -> nn.Module | None:
        if self.ranks_for(rows) > 1:
            return self._rows
        return self.whole if self._rank == 0 else None

    def _decode_tiles(self, latent: torch.Tensor) -> torch.Tensor:
        if self._group is None or "tiled_decode" in vars(self._tiled):
            return self._tiled.decode(latent, return_dict=False)[0]
        with _dealt(self._tiled, self._rank, self._ranks, self._group):
            return self._tiled.decode(latent, return_dict=False)[0]


def _shared_copy(module: nn.Module) -> nn.Module:
    """A copy of the structure of `module` that has the same weights, not copies of them."""
    tensors = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})


def _mean(encoded: Any) -> torch.Tensor:
    """What ComfyUI takes of an encoder's answer: the most likely latent, never a random one."""
    return encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent


@contextmanager
def _tiles_of(module: nn.Module, edge: int) -> Iterator[None]:
    """Within, `module` works in tiles of `edge` by `edge` pixels.

    Raises:
        InvalidInput: the VAE's compression and overlap do not divide `edge`.
    """
    plan = tile_shape_plan(module, edge, edge)
    if plan is None:
        raise InvalidInput(
            f"{type(module).__name__} has no tiles of {edge} pixels; choose another size, or 'none'."
        )
    apply_tile_plan(module, plan)
    module.use_tiling = True
    try:
        yield
    finally:
        module.use_tiling = False
