"""Weights of a transformer's blocks spread over ranks: a block's are together only while it computes.

docs/decisions/010-weight-sharding.md says why this is not PyTorch's FSDP2, nor xfuser's use of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from comfy_xdit.protocol.errors import InvalidInput
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
    """Where a tensor is in the row of all weights of its block, in bytes."""

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
    A weight that is a wrapper around tensors (a quantised one, with its scales) has each of them in the row.

    Args:
        module: the transformer, its weights not read yet.
        blocks: names of its blocks in the order they run.
        dtype: of all weights that are no wrappers; None is each parameter's own.
    """

    def __init__(self, module: nn.Module, blocks: Sequence[str], ranks: int, dtype: torch.dtype | None):
        self._blocks, self._ranks = list(blocks), ranks
        self.places: dict[str, Place] = {}  # of a wrapper's tensors, by its name and theirs
        self.names: list[str] = []  # of the weights
        self._wrappers: dict[str, nn.Parameter] = {}
        self._lengths: list[int] = []  # of each rank's part of each block
        for number, block in enumerate(blocks):
            end = 0
            for name, parameter in module.get_submodule(block).named_parameters(prefix=block):
                self.names.append(name)
                for inner, tensor in tensors_of(parameter).items():
                    if inner:
                        self._wrappers[name] = parameter
                    kept_in = tensor.dtype if inner or dtype is None else dtype
                    place = Place(number, _aligned(end), tensor.shape, kept_in)
                    self.places[name + inner] = place
                    end = place.stop
            self._lengths.append(_aligned(-(-end // ranks)))
        self._coming: tuple[int, list[dist.Work]] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that this rank keeps, with the buffers."""
        return sum(self._lengths) + BUFFERS * max(self._lengths) * self._ranks

    @property
    def whole_nbytes(self) -> int:
        """Bytes of all of the weights."""
        return sum(place.stop - place.start for place in self.places.values())

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
        for weight in self.names:
            owner, _, leaf = weight.rpartition(".")
            setattr(module.get_submodule(owner), leaf, self._gathered(weight))
        for number, name in enumerate(self._blocks):
            block = module.get_submodule(name)
            for method in ("", *_called_too(block)):
                hooks.before(
                    block, method, lambda _module, _args, _kwargs, number=number: self._gather(number)
                )

    def weights(self) -> dict[str, ShardedWeight]:
        """Every weight, to write to."""
        return {name: ShardedWeight(self, name) for name in self.places}

    def write(self, name: str, weight: torch.Tensor) -> None:
        """Keep this rank's part of a whole weight."""
        for inner, tensor in tensors_of(weight).items():
            place = self.places[name + inner]
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

    def _gathered(self, name: str) -> nn.Parameter:
        """The weight over the buffer that it is gathered into."""
        if name not in self._wrappers:
            return nn.Parameter(self._view(self.places[name]), requires_grad=False)
        like = self._wrappers[name]
        views = {inner: self._view(self.places[name + inner]) for inner in tensors_of(like)}
        weight = _wrapper(like, views)
        if any(tensor.data_ptr() != views[inner].data_ptr() for inner, tensor in tensors_of(weight).items()):
            raise InvalidInput(
                f"{name} is quantised in a way ({type(weight).__name__}) that copies what it is made of, and "
                "cannot be spread over ranks; set shard_weights to false."
            )
        return weight

    def _view(self, place: Place) -> torch.Tensor:
        return self._rows[place.block][place.start : place.stop].view(place.dtype).view(place.shape)

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


def tensors_of(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a weight's numbers are in: itself, as ""; or a wrapper's tensors, by ".name"."""
    if not hasattr(weight, "__tensor_flatten__"):
        return {"": weight}
    names, _ = weight.__tensor_flatten__()
    return {f".{name}": getattr(weight, name) for name in names}


def _wrapper(like: torch.Tensor, tensors: dict[str, torch.Tensor]) -> Any:
    """A parameter as `like`, around other tensors."""
    inner = {name.removeprefix("."): tensor for name, tensor in tensors.items()}
    weight = type(like).__tensor_unflatten__(inner, like.__tensor_flatten__()[1], like.shape, None)
    weight._is_param = True  # which nn.Parameter says of a copy that it makes, with tensors of its own
    return weight


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
