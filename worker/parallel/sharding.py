"""Weights of a transformer's blocks spread over ranks: a block's are together only while it computes.

docs/decisions/010-weight-sharding.md says why this is not PyTorch's FSDP2, nor xfuser's use of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from worker.checkpoints import Checkpoint, Part, Source
from worker.clock import communication
from worker.parallel import hooks
from worker.parallel.mesh import arrive

# The block that computes and the next one, whose weights come meanwhile.
BUFFERS = 2
# Bytes a weight, and a rank's part, begins at a multiple of: kernels want their operands aligned.
ALIGNMENT = 256


@dataclass(frozen=True)
class Place:
    """Where a weight is in the row of all weights of its block, in bytes."""

    block: int
    start: int
    shape: torch.Size
    dtype: torch.dtype

    @property
    def stop(self) -> int:
        """The byte after its last."""
        return self.start + self.shape.numel() * self.dtype.itemsize


class ShardedWeights:
    """The weights of some blocks, of which each of `ranks` ranks keeps one part of equal length.

    The weights of a block lie one behind the other in a row that is cut into `ranks` parts. Before a block
    computes, its row is gathered into one of two buffers, where its parameters are views: nothing is
    allocated or copied in a call. All ranks that share the weights must call the blocks alike, and in order.

    Args:
        module: the transformer, its weights not read yet.
        blocks: names of its blocks in the order they run.
        dtype: of all weights; None is each parameter's own.
    """

    def __init__(self, module: nn.Module, blocks: Sequence[str], ranks: int, dtype: torch.dtype | None):
        self._blocks, self._ranks = list(blocks), ranks
        self.places: dict[str, Place] = {}
        self._lengths: list[int] = []  # of each rank's part of each block
        for number, block in enumerate(blocks):
            end = 0
            for name, parameter in module.get_submodule(block).named_parameters():
                place = Place(number, _aligned(end), parameter.shape, dtype or parameter.dtype)
                self.places[f"{block}.{name}"] = place
                end = place.stop
            self._lengths.append(_aligned(-(-end // ranks)))
        self._coming: tuple[int, list[dist.Work]] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that this rank keeps, with the buffers."""
        return sum(self._lengths) + BUFFERS * max(self._lengths) * self._ranks

    def load(
        self,
        module: nn.Module,
        checkpoint: Checkpoint,
        mapping: dict[str, Source],
        group: dist.ProcessGroup,
        device: torch.device,
    ) -> None:
        """Read this rank's parts from the file, and put the parameters where they will be gathered.

        Args:
            group: the ranks that share the weights.
        """
        self.attach(module, group, device)
        for number in range(len(self._blocks)):
            places = {weight: place for weight, place in self.places.items() if place.block == number}
            wanted = {w: Part(mapping[w], *self._own(p)) for w, p in places.items() if self._has(p)}
            # A block at a time, so that no more of the file than that is mapped at once.
            for weight, tensor in checkpoint.parts(wanted):
                self._target(places[weight]).copy_(tensor)

    def attach(self, module: nn.Module, group: dist.ProcessGroup, device: torch.device) -> None:
        """Put the parameters where they will be gathered; `write` gives them their values."""
        self._group, self._rank = group, dist.get_rank(group)
        self._parts = [torch.zeros(n, dtype=torch.uint8, device=device) for n in self._lengths]
        size = max(self._lengths) * self._ranks
        buffers = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(BUFFERS)]
        self._rows = [buffers[i % BUFFERS][: n * self._ranks] for i, n in enumerate(self._lengths)]
        for weight, place in self.places.items():
            owner, _, leaf = weight.rpartition(".")
            view = self._rows[place.block][place.start : place.stop].view(place.dtype).view(place.shape)
            setattr(module.get_submodule(owner), leaf, nn.Parameter(view, requires_grad=False))
        for number, name in enumerate(self._blocks):
            block = module.get_submodule(name)
            for method in ("", *_called_too(block)):
                hooks.before(
                    block, method, lambda _module, _args, _kwargs, number=number: self._gather(number)
                )

    def weights(self) -> dict[str, ShardedWeight]:
        """Every weight, to write to."""
        return {name: ShardedWeight(self, name) for name in self.places}

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Keep this rank's part of a whole weight."""
        place = self.places[name]
        if self._has(place):
            start, stop = self._own(place)
            self._target(place).copy_(tensor.reshape(-1)[start:stop])

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._parts[0].device

    def gather_unused(self) -> None:
        """Take part in a call that only other ranks make."""
        for number in range(len(self._blocks)):
            self._gather(number)

    def _gather(self, number: int) -> None:
        """Have the weights of a block, and let those of the next one come."""
        if self._coming is None or self._coming[0] != number:
            self._settle()  # of a call that an error ended
            self._start(number)
        self._settle()
        if number + 1 < len(self._blocks):
            self._start(number + 1)

    def _settle(self) -> None:
        arrive(self._coming[1] if self._coming is not None else ())
        self._coming = None

    def _start(self, number: int) -> None:
        with communication:
            self._coming = (number, self._gathering(self._rows[number], self._parts[number]))

    def _gathering(self, row: torch.Tensor, part: torch.Tensor) -> list[dist.Work]:
        if part.device.type == "cuda":
            return [dist.all_gather_into_tensor(row, part, group=self._group, async_op=True)]
        # gloo gathers into a copy of the whole row, and broadcasts in place.
        parts = row.chunk(self._ranks)
        parts[self._rank].copy_(part)
        return [
            dist.broadcast(one, group=self._group, group_src=rank, async_op=True)
            for rank, one in enumerate(parts)
        ]

    def _has(self, place: Place) -> bool:
        start, stop = self._own(place)
        return start < stop

    def _own(self, place: Place) -> tuple[int, int]:
        """The elements of a weight that this rank keeps."""
        length = self._lengths[place.block]
        first, size = self._rank * length - place.start, place.stop - place.start
        start, stop = min(max(first, 0), size), min(max(first + length, 0), size)
        return start // place.dtype.itemsize, stop // place.dtype.itemsize

    def _target(self, place: Place) -> torch.Tensor:
        """Where this rank keeps its elements of a weight."""
        start, stop = (element * place.dtype.itemsize for element in self._own(place))
        offset = place.start - self._rank * self._lengths[place.block]
        return self._parts[place.block][offset + start : offset + stop].view(place.dtype)


def _called_too(block: nn.Module) -> list[str]:
    """Methods that some models call in place of the block."""
    return [name for name in vars(type(block)) if name.startswith("forward_")]


def _aligned(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class ShardedWeight:
    """One weight, written as a tensor is."""

    shards: ShardedWeights
    name: str

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.shards.device

    def copy_(self, tensor: torch.Tensor) -> None:
        """Keep this rank's part of the whole weight."""
        self.shards.write(self.name, tensor)
