"""Layers of a VAE whose picture's rows lie in several ranks, with no more memory than their share.

DistVAE 0.1.0 has both and is right, but copies: its convolution joins the neighbours' rows to the
whole input and crops the whole output, its norm makes four tensors of the input's size. A rank of
two then needs 80 % of what one rank needs, where half is due.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from distvae.modules.adapters.layers.conv_adapters import Conv2dAdapter
from distvae.modules.adapters.layers.norm_adapters import GroupNormAdapter
from distvae.utils import ParallelContext
from torch import nn

from worker.clock import communication

ROW = -2  # the dimension rows lie along


class RowConv2d(nn.Module):
    """A 3 x 3 convolution of stride 1. Computed as if the band were the picture, then its edges anew."""

    def __init__(self, convolution: nn.Conv2d, context: ParallelContext):
        super().__init__()
        self.weight, self.bias, self._context = convolution.weight, convolution.bias, context

    @staticmethod
    def fits(convolution: nn.Conv2d) -> bool:
        """Whether it is one of this class."""
        sizes = (convolution.kernel_size, convolution.stride, convolution.padding)
        return sizes == ((3, 3), (1, 1), (1, 1)) and convolution.padding_mode == "zeros"

    def forward(self, band: torch.Tensor) -> torch.Tensor:
        """(B, C, rows, W) to (B, C', rows, W)."""
        above, below = neighbours(band, self._context)
        result = F.conv2d(band, self.weight, self.bias, padding=1)
        rows = band.shape[ROW]
        if above is not None:
            window = [above, band.narrow(ROW, 0, min(2, rows)), *([below] if rows == 1 else [])]
            result.narrow(ROW, 0, 1).copy_(self._edge(window, last_is_edge=rows == 1 and below is None))
        if below is not None and (rows > 1 or above is None):
            window = [band.narrow(ROW, max(0, rows - 2), min(2, rows)), below]
            result.narrow(ROW, rows - 1, 1).copy_(self._edge(window, first_is_edge=rows == 1))
        return result

    def _edge(
        self, window: list[torch.Tensor | None], first_is_edge: bool = False, last_is_edge: bool = False
    ) -> torch.Tensor:
        """One row of the output, of the three around it; beyond the picture's edge are zeros."""
        three = torch.cat([part for part in window if part is not None], dim=ROW)
        three = F.pad(three, (0, 0, int(first_is_edge), int(last_is_edge)))
        return F.conv2d(three, self.weight, self.bias, padding=(0, 1))


class RowGroupNorm(nn.Module):
    """A group norm with the statistics of all ranks, in fp32 whatever the dtype of the band."""

    def __init__(self, norm: nn.GroupNorm, context: ParallelContext):
        super().__init__()
        self.weight, self.bias, self._context = norm.weight, norm.bias, context
        self._groups, self._eps = norm.num_groups, norm.eps

    def forward(self, band: torch.Tensor) -> torch.Tensor:
        """As `group_norm`."""
        return group_norm(band, self._groups, self.weight, self.bias, self._eps, self._context)


def group_norm(
    band: torch.Tensor,
    groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    context: ParallelContext,
) -> torch.Tensor:
    """(B, C, [T,] rows, W), normalised over everything but batch and groups of channels."""
    batch, channels = band.shape[:2]
    mean, variance = _joined(*_moments(band.reshape(batch, groups, -1)), context)
    each = channels // groups
    # Known statistics per channel are what a batch norm takes; pictures of a batch become channels.
    mean, variance = (part.repeat_interleave(each, dim=1).flatten() for part in (mean, variance))
    weight, bias = (part.float().repeat(batch) for part in (weight, bias))
    rows = band.reshape(1, batch * channels, *band.shape[2:])
    rows = F.batch_norm(rows, mean.float(), variance.float(), weight, bias, False, 0.0, eps)
    return rows.view(band.shape)


def _joined(
    places: float, mean: torch.Tensor, variance: torch.Tensor, context: ParallelContext
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance, (B, groups), of all bands (Chan, Golub and LeVeque, 1979)."""
    own = torch.stack([torch.full_like(mean, places), mean, variance])
    bands = [torch.empty_like(own) for _ in range(context.world_size)]
    with communication:
        dist.all_gather(bands, own, group=context.group)
    count, means, variances = torch.stack(bands).double().unbind(1)
    weights = count / count.sum(0)
    mean = (weights * means).sum(0)
    return mean, (weights * (variances + (means - mean) ** 2)).sum(0)


def _moments(values: torch.Tensor) -> tuple[float, torch.Tensor, torch.Tensor]:
    """How many numbers there are in the last dimension, their mean and their variance, in fp32.

    A half's own reductions would round both to the half, so it is copied to fp32: group by group, since the
    whole would triple the memory.
    """
    rows = values.flatten(0, -2)
    variance, mean = zip(*(torch.var_mean(row.float(), correction=0) for row in rows), strict=True)
    shape = values.shape[:-1]
    return float(values.shape[-1]), torch.stack(mean).view(shape), torch.stack(variance).view(shape)


def use_lean_layers(rows: nn.Module, context: ParallelContext) -> None:
    """Put these layers in the place of DistVAE's, wherever they fit."""
    for parent in list(rows.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, GroupNormAdapter):
                setattr(parent, name, RowGroupNorm(child.group_norm, context))
            elif isinstance(child, Conv2dAdapter) and RowConv2d.fits(child.conv2d):
                setattr(parent, name, RowConv2d(child.conv2d, context))


def neighbours(
    band: torch.Tensor, context: ParallelContext, above: int = 1, below: int = 1
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """So many rows above a band and below it; None where there are none: beyond the edge of the picture."""
    # What the one above gets is what a rank has of the one below, and the other way round.
    first, last = band.narrow(ROW, 0, below), band.narrow(ROW, band.shape[ROW] - above, above)
    operations, received = [], []
    for other, own, rows in ((context.rank - 1, first, above), (context.rank + 1, last, below)):
        beyond = not 0 <= other < context.world_size
        shape = (*band.shape[:ROW], rows, band.shape[-1])
        received.append(None if beyond or not rows else band.new_empty(shape))
        rank = None if beyond else context.global_rank(other)
        if rank is not None and own.numel():
            operations.append(dist.P2POp(dist.isend, own.contiguous(), rank, group=context.group))
        if received[-1] is not None:
            operations.append(dist.P2POp(dist.irecv, received[-1], rank, group=context.group))
    with communication:
        for work in dist.batch_isend_irecv(operations):
            work.wait()
    return received[0], received[1]
