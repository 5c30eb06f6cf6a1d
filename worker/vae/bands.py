"""A VAE's own forward on bands of rows, for classes whose layers DistVAE does not have.

What looks beyond a band is caught where torch computes it: a convolution and a padding get the neighbours'
rows, a group norm the statistics of all bands. A module that looks at every place is given all rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from distvae.utils import ParallelContext
from torch import nn
from torch.overrides import TorchFunctionMode

from worker.clock import communication
from worker.vae.rows import ROW, group_norm, neighbours

# diffusers' classes that run so; each is compared with the whole in tests/test_vae_parallel.py.
BANDED = ("AutoencoderKLCogVideoX", "AutoencoderKLMochi", "AutoencoderDC")
OF_ALL_PLACES = ("SanaMultiscaleLinearAttention",)
# Convolve a large input in parts: how many depends on a band's size, and all ranks must exchange as often.
IN_PARTS = ("CogVideoXSafeConv3d",)


class Bands(TorchFunctionMode):
    """Within it this rank has a band, and every rank of `context` runs the same layers."""

    def __init__(self, module: nn.Module, context: ParallelContext):
        super().__init__()
        self._context, self._rows, self._has_all = context, [0] * context.world_size, False
        for child in module.modules():
            if type(child).__name__ in OF_ALL_PLACES:
                child.forward = _on_all_rows(child.forward, self)
            elif type(child).__name__ in IN_PARTS:
                child.forward = _extended_once(child, self)

    def run(
        self, whole: torch.Tensor, rows: int, work: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor | None:
        """`work` on this rank's band of a tensor of so many latent rows; on rank 0 the joined results."""
        ranks, rank = self._context.world_size, self._context.rank
        self._rows = [rows // ranks + (one < rows % ranks) for one in range(ranks)]
        each = whole.shape[ROW] // rows
        start = sum(self._rows[:rank]) * each
        with self:
            result = work(whole.narrow(ROW, start, self._rows[rank] * each).contiguous())
        return self._joined_on_first(result.contiguous())

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """A function of torch's, as every rank calls it."""
        caught = None if self._has_all else _CAUGHT.get(func)
        return func(*args, **(kwargs or {})) if caught is None else caught(self, *args, **(kwargs or {}))

    def conv2d(self, band: torch.Tensor, weight: torch.Tensor, *args: Any, **named: Any) -> torch.Tensor:
        """A convolution of pictures."""
        return self._convolve(F.conv2d, band, weight, *args, **named)

    def conv3d(self, band: torch.Tensor, weight: torch.Tensor, *args: Any, **named: Any) -> torch.Tensor:
        """A convolution of videos."""
        return self._convolve(F.conv3d, band, weight, *args, **named)

    def pad(
        self, band: torch.Tensor, pad: list[int], mode: str = "constant", value: float | None = None
    ) -> torch.Tensor:
        """A padding, above and below only where the picture ends."""
        sides = list(pad)
        if len(sides) < 4 or not any(sides[2:4]):
            return F.pad(band, sides, mode, value)
        beside = [*sides[:2], 0, 0, *sides[4:]]
        return self.extended(F.pad(band, beside, mode, value), sides[2], sides[3], mode, value)

    def group_norm(
        self,
        band: torch.Tensor,
        groups: int,
        weight: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        eps: float = 1e-5,
    ) -> torch.Tensor:
        """A group norm over the rows of all bands."""
        return group_norm(band, groups, weight, bias, eps, self._context)

    @contextmanager
    def all_rows(self) -> Iterator[None]:
        """Within, tensors are no bands."""
        self._has_all = True
        try:
            yield
        finally:
            self._has_all = False

    def gathered(self, band: torch.Tensor) -> torch.Tensor:
        """The rows of all ranks."""
        each = band.shape[ROW] // self._rows[self._context.rank]
        most = max(self._rows) * each
        own = F.pad(band, (0, 0, 0, most - band.shape[ROW])).contiguous()
        bands = [torch.empty_like(own) for _ in self._rows]
        with communication:
            dist.all_gather(bands, own, group=self._context.group)
        return torch.cat(
            [b.narrow(ROW, 0, n * each) for b, n in zip(bands, self._rows, strict=True)], dim=ROW
        )

    def own(self, whole: torch.Tensor) -> torch.Tensor:
        """This rank's rows of what `gathered` is shaped like."""
        each, rank = whole.shape[ROW] // sum(self._rows), self._context.rank
        return whole.narrow(ROW, sum(self._rows[:rank]) * each, self._rows[rank] * each)

    def _convolve(
        self,
        convolve: Callable[..., torch.Tensor],
        band: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> torch.Tensor:
        dimensions = weight.ndim - 2
        around = [padding] * dimensions if isinstance(padding, int) else list(padding)
        if around[ROW]:
            band = self.extended(band, around[ROW], around[ROW])
            around[ROW] = 0
        return convolve(band, weight, bias, stride, around, dilation, groups)

    def extended(
        self, band: torch.Tensor, above: int, below: int, mode: str = "constant", value: float | None = None
    ) -> torch.Tensor:
        """The band between rows of its neighbours; where the picture ends, padded."""
        upper, lower = neighbours(band, self._context, above, below)
        band = torch.cat([part for part in (upper, band, lower) if part is not None], dim=ROW)
        missing = [above if upper is None else 0, below if lower is None else 0]
        return F.pad(band, [0, 0, *missing, *[0, 0] * (band.ndim - 4)], mode, value) if any(missing) else band

    def _joined_on_first(self, band: torch.Tensor) -> torch.Tensor | None:
        context = self._context
        each = band.shape[ROW] // self._rows[context.rank]
        with communication:
            if context.rank:
                dist.send(band, context.global_rank(0), group=context.group)
                return None
            bands = [band]
            for rank, rows in enumerate(self._rows[1:], 1):
                shape = (*band.shape[:ROW], rows * each, band.shape[-1])
                bands.append(band.new_empty(shape))
                dist.recv(bands[-1], context.global_rank(rank), group=context.group)
        return torch.cat(bands, dim=ROW)


def _on_all_rows(
    forward: Callable[[torch.Tensor], torch.Tensor], bands: Bands
) -> Callable[..., torch.Tensor]:
    def call(band: torch.Tensor) -> torch.Tensor:
        with bands.all_rows():
            return bands.own(forward(bands.gathered(band))).contiguous()

    return call


def _extended_once(convolution: nn.Conv3d, bands: Bands) -> Callable[[torch.Tensor], torch.Tensor]:
    *before, rows, beside = convolution.padding
    forward, convolution.padding = convolution.forward, (*before, 0, beside)

    def call(band: torch.Tensor) -> torch.Tensor:
        with bands.all_rows():
            return forward(bands.extended(band, rows, rows) if rows else band)

    return call


_CAUGHT: dict[Any, Callable[..., torch.Tensor]] = {
    F.conv2d: Bands.conv2d,
    F.conv3d: Bands.conv3d,
    F.pad: Bands.pad,
    F.group_norm: Bands.group_norm,
}
