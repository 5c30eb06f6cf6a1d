"""Which tokens of a call each rank has: parts of streams, as even as they go, and never padded."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from worker.parallel.plan import (
    WHOLE,
    Carrier,
    Compressed,
    Count,
    Frames,
    Grid,
    GroupedMask,
    Named,
    PlanMismatch,
    Spans,
    Tokens,
    Voxels,
    of_each,
)


@dataclass(frozen=True)
class Shard:
    """`length` things over `ranks`, in whole units: the first ranks have one more where needed."""

    length: int
    ranks: int
    unit: int = 1

    def start(self, rank: int) -> int:
        """The first of `rank`; what comes after the last rank's is `length`."""
        units = self.length // self.unit
        return (rank * (units // self.ranks) + min(rank, units % self.ranks)) * self.unit

    def size(self, rank: int) -> int:
        """How many `rank` has; maybe none."""
        return self.start(rank + 1) - self.start(rank)

    def span(self, rank: int) -> slice:
        """Where those of `rank` are."""
        return slice(self.start(rank), self.start(rank + 1))

    @cached_property
    def sizes(self) -> list[int]:
        """How many every rank has."""
        return [self.size(rank) for rank in range(self.ranks)]


@dataclass(frozen=True)
class Part:
    """What of one stream a call brings, and what of that this rank has.

    Many blocks cannot compute on nothing. A rank without any token holds the stream's first one: nothing
    attends to it and nothing is made of it. Of a stream without tokens there is none to hold.

    Args:
        length: tokens of the whole stream.
        first: the first token of the call; `shard` counts from there.
    """

    length: int
    first: int
    shard: Shard
    rank: int

    @cached_property
    def true(self) -> int:
        """How many tokens this rank has to compute."""
        return self.shard.size(self.rank)

    @cached_property
    def held(self) -> tuple[int, int]:
        """First and last-plus-one of the tokens this rank's blocks compute on."""
        start = self.first + self.shard.start(self.rank)
        return (start, start + self.true) if self.true else (0, min(1, self.length))

    @cached_property
    def size(self) -> int:
        """How many this rank's blocks compute on: at least one, if the stream has any."""
        start, stop = self.held
        return stop - start


def added_up(parts: Iterable[Part]) -> list[int]:
    """How many true tokens of a sequence of these parts every rank has."""
    return [sum(sizes) for sizes in zip(*(part.shard.sizes for part in parts), strict=True)]


class Parts:
    """The parts of all streams in one call of a model."""

    def __init__(self, ranks: int, rank: int):
        self.ranks, self.rank = ranks, rank
        self._of: dict[str, Part] = {}
        # Of sequences, until a stream is brought anew: every block of a call asks for the same.
        self._sizes: dict[str, list[int]] = {}
        self._true: dict[str, bool] = {}

    def __getitem__(self, stream: str) -> Part:
        return self._of[stream]

    def __contains__(self, stream: str) -> bool:
        return stream in self._of

    def bring(
        self,
        stream: str,
        length: int,
        unit: int = 1,
        span: tuple[int, int] | None = None,
        every: bool = False,
    ) -> None:
        """A stream of so many tokens; a call may bring a `span` of them only.

        Args:
            every: each rank needs tokens of its own.

        Raises:
            PlanMismatch: its length is no number of whole units, or there are fewer units than ranks.
        """
        if (unit > 1 or every) and (length % unit or length // unit < self.ranks):
            raise PlanMismatch(
                f"{length} {stream} tokens in rows of {unit} cannot be split over {self.ranks} ranks, each "
                "of which needs a row; draw a larger picture, or use fewer ranks for one sequence"
            )
        first, stop = span or (0, length)
        self._sizes.clear()
        self._true.clear()
        self._of[stream] = Part(length, first, Shard(stop - first, self.ranks, unit), self.rank)

    def sizes(self, streams: str) -> list[int]:
        """How many true tokens of a sequence every rank has."""
        if streams not in self._sizes:
            self._sizes[streams] = added_up(self._of[name] for name in streams.split())
        return self._sizes[streams]

    def all_true(self, streams: str) -> bool:
        """Whether this rank has tokens of every stream, so that no token stands in for none."""
        if streams not in self._true:
            self._true[streams] = all(self._of[name].true for name in streams.split())
        return self._true[streams]

    def true(self, tensor: torch.Tensor, streams: str, dim: int) -> torch.Tensor:
        """Without the token that stands in for none."""
        if self.all_true(streams):
            return tensor
        parts = [self._of[name] for name in streams.split()]
        pieces = tensor.split([part.size for part in parts], dim)
        return torch.cat([p.narrow(dim, 0, part.true) for p, part in zip(pieces, parts, strict=True)], dim)

    def held(self, tensor: torch.Tensor, streams: str, dim: int) -> torch.Tensor:
        """With zeros for the tokens that `true` left out."""
        if self.all_true(streams):
            return tensor
        parts = [self._of[name] for name in streams.split()]
        pieces = tensor.split([part.true for part in parts], dim)
        shape = list(tensor.shape)
        shape[dim] = 1
        zero = tensor.new_zeros(shape)
        filled = [
            p if part.true else zero.narrow(dim, 0, part.size) for p, part in zip(pieces, parts, strict=True)
        ]
        return torch.cat(filled, dim)

    # ------------------------------------------------------------------ cutting

    def take(self, carrier: Carrier | tuple[Carrier, ...], value: Any) -> Any:
        """This rank's part of an argument."""
        if value is None:
            return None
        if isinstance(carrier, Spans):
            return list(self._spans(carrier.streams.split(), value))
        if isinstance(carrier, Voxels):
            return self._voxels(carrier, value)
        if isinstance(carrier, Named):
            return self._entries(carrier, value)
        if isinstance(value, (tuple, list)):
            return type(value)(self.take(one, part) for one, part in of_each(carrier, value))
        if isinstance(carrier, Count):
            return self._count(self._of[carrier.streams], value)
        if isinstance(carrier, Compressed):
            return self._compressed(carrier, value)
        if isinstance(carrier, GroupedMask):
            return self._mask(carrier, value)
        if not isinstance(value, torch.Tensor):
            return value
        if isinstance(carrier, Grid):
            flat = self.cut(value.flatten(carrier.first, carrier.last), carrier.streams, carrier.first)
            return flat.unflatten(carrier.first, (-1, *(1,) * (carrier.last - carrier.first)))
        if isinstance(carrier, Frames):
            return self._frames(carrier, value)
        return self._tokens(carrier, value)

    def cut(self, tensor: torch.Tensor, streams: str, dim: int) -> torch.Tensor:
        """This rank's part of a tensor that has whole streams along `dim`.

        Raises:
            PlanMismatch: it has another number of tokens.
        """
        pieces = self._pieces(tensor, streams, dim)
        parts = []
        for name, piece in zip(streams.split(), pieces, strict=True):
            start, stop = (0, piece.shape[dim]) if name == WHOLE else self._of[name].held
            parts.append(piece.narrow(dim, start, stop - start))
        # A copy in any case: blocks may write into their streams.
        return torch.cat(parts, dim) if len(parts) > 1 else parts[0].clone()

    def _pieces(self, tensor: torch.Tensor, streams: str, dim: int) -> tuple[torch.Tensor, ...]:
        lengths = [None if name == WHOLE else self._of[name].length for name in streams.split()]
        known = sum(length for length in lengths if length is not None)
        rest = tensor.shape[dim] - known
        if rest < 0 or (rest and None not in lengths):
            raise PlanMismatch(f"a tensor of {tensor.shape[dim]} rows lies along {known} tokens ({streams})")
        return tensor.split([rest if length is None else length for length in lengths], dim)

    def _tokens(self, carrier: Tokens, value: torch.Tensor) -> torch.Tensor:
        dim = carrier.dim
        if carrier.ndim not in (None, value.ndim):
            return value
        if isinstance(dim, Mapping):
            dim = dim[value.ndim]
        if isinstance(dim, tuple):
            dim = next((one for one in dim if value.shape[one] > 1), dim[0])
        names = carrier.streams.split()
        if value.shape[dim] == 1 and (WHOLE in names or sum(self._of[n].length for n in names) != 1):
            return value
        if carrier.last:
            part = self._of[carrier.streams]
            missing = part.length - value.shape[dim]
            start, stop = (max(0, end - missing) for end in part.held)
            return value.narrow(dim, start, stop - start)
        return self.cut(value, carrier.streams, dim)

    def _frames(self, carrier: Frames, value: torch.Tensor) -> torch.Tensor:
        if value.ndim != carrier.ndim or value.shape[1] == 1:
            return value
        part = self._of[carrier.streams]
        per_frame = -(-part.length // value.shape[1])
        return value[:, torch.arange(*part.held, device=value.device) // per_frame]

    def _compressed(self, carrier: Compressed, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self._tokens(Tokens(carrier.streams), value)
        data, every = getattr(value, carrier.data), getattr(value, carrier.every)
        part = self._of[carrier.streams]
        if data.shape[1] > 1:
            if data.shape[1] * every != part.length:
                raise PlanMismatch(
                    f"{data.shape[1]} entries for {every} tokens each lie along {part.length} tokens "
                    f"({carrier.streams})"
                )
            data = data[:, torch.arange(*part.held, device=data.device) // every]
        own = copy.copy(value)
        for name, content in ((carrier.data, data), (carrier.entries, data.shape[1]), (carrier.every, 1)):
            setattr(own, name, content)
        return own

    def _mask(self, carrier: GroupedMask, value: Any) -> torch.Tensor:
        if isinstance(value, torch.Tensor):
            return value
        start, count = getattr(value, carrier.start), getattr(value, carrier.count)
        length = self._of[carrier.streams].length
        group = getattr(value, carrier.group)
        mask = group.new_zeros(1, 1, length, length)
        mask[:, :, :start] = getattr(value, carrier.before)
        mask[:, :, start : start + count] = group
        return mask

    def _voxels(self, carrier: Voxels, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            rows = (self._voxels(carrier, tensor) for tensor in (value.feats, value.coords))
            return type(value)(*rows, value.shape)
        rows = value.unflatten(0, (-1, self._of[carrier.streams].length))
        return self.cut(rows, carrier.streams, 1).flatten(0, 1)

    def _entries(self, carrier: Named, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return value | {
            name: self.take(c, value[name]) for name, c in carrier.entries.items() if name in value
        }

    def _count(self, part: Part, value: int) -> int:
        start, stop = part.held
        unit = part.shard.unit
        return min(max(value * unit - start, 0), stop - start) // unit

    def _spans(self, names: list[str], value: Any) -> Iterator[tuple[Any, ...]]:
        at = first = 0
        for name in names:
            part = self._of[name]
            start, stop = part.held
            for low, high, *content in value:
                high = first + part.length if high is None else high
                own = max(low - first, start), min(high - first, stop)
                if own[0] < own[1]:
                    rows = slice(own[0] + first - low, own[1] + first - low)
                    content = [one[rows] if isinstance(one, torch.Tensor) else one for one in content]
                    yield at + own[0] - start, at + own[1] - start, *content
            at, first = at + part.size, first + part.length
