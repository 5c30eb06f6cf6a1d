"""The ranks that share one sequence of tokens, and what they send each other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from worker.clock import communication


@dataclass
class Traffic:
    """What one rank has sent: collectives, and bytes that crossed to another rank."""

    collectives: int = 0
    sent: int = 0

    def count(self, elements: int, tensor: torch.Tensor) -> None:
        """One more collective, in which so many elements like those of `tensor` leave this rank."""
        self.collectives += 1
        self.sent += elements * tensor.element_size()


@dataclass(frozen=True)
class Mesh:
    """This rank among `ulysses` x `ring` ranks. Consecutive ones are a Ulysses group, as in xfuser.

    Args:
        rank: of this process among those that share the sequence.
        ulysses_group, ring_group, group: their process groups; None where there is one rank.
        first: the global rank of the first of them, where they are consecutive.
    """

    ulysses: int = 1
    ring: int = 1
    rank: int = 0
    ulysses_group: Any = None
    ring_group: Any = None
    group: Any = None
    traffic: Traffic = field(default_factory=Traffic, compare=False)

    @property
    def ranks(self) -> int:
        """How many share the sequence."""
        return self.ulysses * self.ring

    @property
    def ulysses_rank(self) -> int:
        """Which of the attention heads are this rank's."""
        return self.rank % self.ulysses

    @property
    def ring_rank(self) -> int:
        """Which block of keys this rank begins with."""
        return self.rank // self.ulysses

    def block(self, ring_rank: int) -> range:
        """The ranks whose keys one block of the ring holds: a Ulysses group."""
        return range(ring_rank * self.ulysses, (ring_rank + 1) * self.ulysses)

    def exchange(self, sent: torch.Tensor, sizes: Sequence[int], coming: Sequence[int]) -> torch.Tensor:
        """All-to-all of flat chunks in the Ulysses group; `sizes` of those sent, `coming` of the others."""
        self.traffic.count(sent.numel() - sizes[self.ulysses_rank], sent)
        arrived = sent.new_empty(sum(coming))
        with communication:
            dist.all_to_all_single(arrived, sent, list(coming), list(sizes), group=self.ulysses_group)
        return arrived

    def pass_on(self, block: torch.Tensor, arriving: torch.Tensor) -> list[dist.Work]:
        """Send a block of keys to the next rank of the ring while that of the one before arrives."""
        return self._swap(
            [
                dist.P2POp(dist.isend, block, group=self.ring_group, group_peer=self._beside(1)),
                dist.P2POp(dist.irecv, arriving, group=self.ring_group, group_peer=self._beside(-1)),
            ]
        )

    def neighbours(self, top: torch.Tensor, bottom: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The last of the rank before and the first of the rank behind, where there are such ranks.

        Args:
            top, bottom: the first and last of this rank, alike in shape on all ranks.
        """
        ops, above, below = [], None, None
        if self.rank > 0:
            above = torch.empty_like(bottom)
            ops += [self._to(dist.isend, top, -1), self._to(dist.irecv, above, -1)]
        if self.rank + 1 < self.ranks:
            below = torch.empty_like(top)
            ops += [self._to(dist.isend, bottom, 1), self._to(dist.irecv, below, 1)]
        arrive(self._swap(ops))
        return above, below

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' tensors."""
        self.traffic.count(2 * tensor.numel() * (self.ranks - 1) // self.ranks, tensor)
        tensor = tensor.contiguous()
        with communication:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def gather(self, part: torch.Tensor, sizes: Sequence[int], dim: int) -> list[torch.Tensor]:
        """Every rank's part, of so many entries along `dim`. They are padded on the wire only."""
        elements = part.numel() // max(part.shape[dim], 1) * max(sizes)
        self.traffic.count(elements * (self.ranks - 1), part)
        return gather_parts(part, sizes, dim, self.group)

    def _beside(self, distance: int) -> int:
        return (self.ring_rank + distance) % self.ring

    def _to(self, operation: Any, tensor: torch.Tensor, distance: int) -> dist.P2POp:
        return dist.P2POp(operation, tensor, group=self.group, group_peer=self.rank + distance)

    def _swap(self, ops: list[dist.P2POp]) -> list[dist.Work]:
        ops = [op for op in ops if op.tensor.numel()]  # both sides know where there is nothing
        for op in ops:
            if op.op is dist.isend:
                self.traffic.count(op.tensor.numel(), op.tensor)
        with communication:
            return dist.batch_isend_irecv(ops) if ops else []


def arrive(works: Iterable[dist.Work]) -> None:
    """Wait for what is on its way."""
    with communication:
        for work in works:
            work.wait()


def gather_parts(part: torch.Tensor, sizes: Sequence[int], dim: int, group: Any) -> list[torch.Tensor]:
    """Every rank's part, of so many entries along `dim`. They are padded on the wire only."""
    most = max(sizes)
    if not most:
        return [part] * len(sizes)
    part = part.transpose(0, dim)
    if len(part) < most:
        part = torch.cat([part, part.new_zeros(most - len(part), *part.shape[1:])])
    part = part.contiguous()
    every = part.new_empty(len(sizes) * most, *part.shape[1:])
    with communication:
        dist.all_gather_into_tensor(every, part, group=group)
    return [whole[:size].transpose(0, dim) for whole, size in zip(every.split(most), sizes, strict=True)]
