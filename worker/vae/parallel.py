"""One VAE over all ranks: in rows that exchange their edges (exact), or in tiles with blended seams.

The work is DistVAE's. Three structures share one set of weights: the whole VAE, one whose layers
know that they hold some rows of a picture, and one whose tiles are dealt out to the ranks.
"""

from __future__ import annotations

import copy
import functools
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

from worker.vae.bands import BANDED, Bands
from worker.vae.rows import use_lean_layers

HEIGHT = -2  # rows are along it


class SpreadVAE:
    """A diffusers VAE, and its decode and encode by all ranks of `group` (None: one rank).

    All ranks call the same method with the same tensor. Where only some have work, `None` comes
    back on the others; rank 0 always has the result.
    """

    def __init__(self, module: nn.Module, spatial: int, group: dist.ProcessGroup | None):
        self.whole, self._group, self._spatial = module, group, spatial
        self._ranks = 1 if group is None else dist.get_world_size(group)
        self._rank = 0 if group is None else dist.get_rank(group)
        self._tiled = _shared_copy(module)
        self._rows, self._bands = None, None
        if group is None:
            return
        self._context = parallel_context(group, HEIGHT, ndim=4)
        dispatch, assemble = sharing(self._context)
        tiled_decode = tiled_decode_for(self._tiled, dispatch, assemble)
        if tiled_decode is not None:
            self._tiled.tiled_decode = tiled_decode
        if decoder_adapter_name(module) and encoder_adapter_name(module):
            self._rows = _shared_copy(module)
            parallelize_decoder(self._rows, group)
            parallelize_encoder(self._rows, group)
            _cut_bands(self._rows, spatial)
            use_lean_layers(self._rows, self._context)
        elif type(module).__name__ in BANDED:
            self._rows = _shared_copy(module)
            self._bands = Bands(self._rows, self._context)

    def ranks_for(self, rows: int) -> int:
        """How many ranks decode or encode a picture of so many latent rows, when it is not tiled."""
        return self._ranks if self._rows is not None and rows >= self._ranks else 1

    def decode(self, latent: torch.Tensor, tile: int) -> torch.Tensor | None:
        """diffusers' decode of one latent; `tile` is the edge of a tile in pixels, 0 is no tiles."""
        if tile:
            with _tiles_of(self._tiled, tile):
                return self._decode_tiles(latent)
        return self._by_rows(
            latent, latent.shape[HEIGHT], lambda vae, part: vae.decode(part, return_dict=False)[0]
        )

    def encode(self, pixels: torch.Tensor, tile: int, rows: int) -> torch.Tensor | None:
        """diffusers' encode of one picture or video of `rows` latent rows: the posterior's mean."""
        if not tile:
            return self._by_rows(pixels, rows, lambda vae, part: _mean(vae.encode(part)))
        if self._rank > 0:  # nobody spreads the tiles of an encoder
            return None
        with _tiles_of(self._tiled, tile):
            return _mean(self._tiled.encode(pixels))

    def on_block(self, pause: Callable[[], None]) -> None:
        """Have `pause` called before every block of the network that all ranks come to together."""
        together = self._rows if self._ranks > 1 else self.whole
        for name, blocks in together.named_modules() if together is not None else ():
            if isinstance(blocks, nn.ModuleList) and name.endswith(("up_blocks", "down_blocks")):
                for block in blocks:
                    block.register_forward_pre_hook(lambda *_: pause())

    def _by_rows(
        self, whole: torch.Tensor, rows: int, work: Callable[[nn.Module, torch.Tensor], torch.Tensor]
    ) -> torch.Tensor | None:
        """`work` on a tensor of so many latent rows, by all ranks if there are rows enough."""
        if self.ranks_for(rows) == 1:
            return work(self.whole, whole) if self._rank == 0 else None
        if self._bands is None:
            return work(self._rows, whole)
        return self._bands.run(whole, rows, lambda band: work(self._rows, band))

    def _decode_tiles(self, latent: torch.Tensor) -> torch.Tensor:
        if self._group is None or "tiled_decode" in vars(self._tiled):
            return self._tiled.decode(latent, return_dict=False)[0]
        dispatch, _ = sharing(self._context)
        with _Dealer.in_place_of(self._tiled, self._spatial) as dealer:
            self._tiled.decode(latent)  # the dealer writes down the tiles that diffusers asks for
            dealer.decoded = dispatch(dealer.calls())
            return self._tiled.decode(latent, return_dict=False)[0]


class _Dealer(nn.Module):
    """Stands in for a decoder while diffusers walks its tiles, so that the ranks can share them.

    The first walk writes down the inputs and answers with sizes only, on the meta device; the
    second answers with what was decoded meanwhile. For classes whose loop DistVAE does not have.
    """

    def __init__(self, decoder: nn.Module, spatial: int):
        super().__init__()
        self.decoder, self._spatial = decoder, spatial
        self._tiles: list[list[torch.Tensor]] = []
        self.decoded: list[torch.Tensor] | None = None

    @classmethod
    @contextmanager
    def in_place_of(cls, module: nn.Module, spatial: int) -> Iterator[_Dealer]:
        """Within, `module.decoder` is a dealer."""
        decoder = module.decoder
        module.decoder = cls(decoder, spatial)
        try:
            yield module.decoder
        finally:
            module.decoder = decoder

    def forward(self, latent: torch.Tensor, conv_cache: Any = None) -> Any:
        """A decoder's call: a video tile comes in several, each with the cache of the one before."""
        if self.decoded is None:
            if conv_cache is None:
                self._tiles.append([])
            self._tiles[-1].append(latent)
            sides = [side * self._spatial for side in latent.shape[HEIGHT:]]
            answer = torch.empty((1, 3, *latent.shape[2:HEIGHT], *sides), device="meta")
        elif conv_cache is None:
            answer = self.decoded.pop(0)
        else:  # all of the tile's frames came with its first call
            answer = latent.new_empty((1, 3, 0, *(side * self._spatial for side in latent.shape[HEIGHT:])))
        return (answer, {}) if latent.ndim == 5 else answer

    def calls(self) -> list[Callable[[], torch.Tensor]]:
        """What decodes each tile."""
        return [functools.partial(self._decode, parts) for parts in self._tiles]

    def _decode(self, parts: list[torch.Tensor]) -> torch.Tensor:
        if parts[0].ndim == 4:
            return self.decoder(parts[0])
        frames, cache = [], None
        for part in parts:
            decoded, cache = self.decoder(part, conv_cache=cache)
            frames.append(decoded)
        return torch.cat(frames, dim=2)


def _shared_copy(module: nn.Module) -> nn.Module:
    """A copy of the structure of `module` that has the same weights, not copies of them."""
    tensors = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})


def _cut_bands(rows: nn.Module, spatial: int) -> None:
    """Say where a video may be cut into bands: DistVAE 0.1.0 is right for pictures and for Wan 2.1.

    It takes 8 for what Qwen-Image's and HunyuanVideo 1.5's configurations do not say, divides by a
    patch size that LTX-2 applies inside its encoder, and cuts Wan 2.2's latents as if they were pixels.
    """
    if not hasattr(rows.decoder, "patchify"):
        return  # pictures: counted off the layers
    outside = rows.config.get("patch_size") if "scale_factor_spatial" in rows.config else None
    rows.encoder.patchify.scale_factor = spatial // (outside or 1)
    rows.decoder.patchify.scale_factor = 1


def _mean(encoded: Any) -> torch.Tensor:
    """What ComfyUI takes of an encoder's answer: the most likely latent, never a random one."""
    return encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent


@contextmanager
def _tiles_of(module: nn.Module, edge: int) -> Iterator[None]:
    """Within, `module` works in tiles of `edge` by `edge` pixels.

    Or in tiles of its class's own size, where `edge` and the overlap do not fit together (CogVideoX).
    """
    plan = tile_shape_plan(module, edge, edge)
    if plan is not None:
        apply_tile_plan(module, plan)
    module.use_tiling = True
    try:
        yield
    finally:
        module.use_tiling = False
