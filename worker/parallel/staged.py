"""Exchanges through main memory, for ranks that share one GPU: NCCL takes one rank per device, gloo none.

For tests alone. A process group of torch.distributed, so that everything that ranks exchange goes this way
unchanged: tensors are copied out, travel on gloo, and are copied back where they are waited for.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

STAGED = "XDIT_STAGED_EXCHANGES"  # environment: 1. Only tests set it
NAME = "staged"
Copies = list[tuple[torch.Tensor, torch.Tensor]]  # where results belong, and where they arrive


def backend_of(device: torch.device) -> str:
    """The backend for what the ranks exchange of tensors on `device`."""
    if os.environ.get(STAGED) != "1":
        return "nccl" if device.type == "cuda" else "gloo"
    if NAME not in dist.Backend.backend_list:
        dist.Backend.register_backend(NAME, StagedGroup, devices=["cpu", "cuda"])
    return NAME


class _Arrival(dist.Work):
    """Work on its way in main memory. Its results are in their places behind `wait`."""

    def __init__(self, work: dist.Work, copies: Copies):
        super().__init__()
        self._work, self._copies = work, copies

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Wait as long as the group does."""
        self._work.wait()
        for place, arrived in self._copies:
            place.copy_(arrived)
        self._copies = []
        return True


class StagedGroup(dist.ProcessGroup):
    """What ranks exchange of tensors on any device, as torch.distributed's functions ask a group for it."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta):
        super().__init__(rank, size)
        self._gloo = dist.ProcessGroupGloo(store, rank, size, timeout)

    def getBackendName(self) -> str:
        """Of the backend."""
        return NAME

    def broadcast(self, tensors: list[torch.Tensor], options: Any) -> dist.Work:
        """In place."""
        return self._in_place(tensors, lambda staged: self._gloo.broadcast(staged, options))

    def allreduce(self, tensors: list[torch.Tensor], options: Any) -> dist.Work:
        """In place."""
        return self._in_place(tensors, lambda staged: self._gloo.allreduce(staged, options))

    def allgather(
        self, every: list[list[torch.Tensor]], own: list[torch.Tensor], options: Any = None
    ) -> dist.Work:
        """Into one tensor per rank."""
        arriving = [[_beside(tensor) for tensor in of_one] for of_one in every]
        work = self._gloo.allgather(arriving, _staged(own))
        pairs = zip(every, arriving, strict=True)
        return _Arrival(work, [pair for of_one in pairs for pair in zip(*of_one, strict=True)])

    def all_gather_single(self, every: torch.Tensor, own: torch.Tensor, options: Any = None) -> dist.Work:
        """Into one tensor."""
        return self.allgather([list(every.chunk(self.size()))], [own])

    def all_to_all_single(
        self, arrived: torch.Tensor, sent: torch.Tensor, coming: list[int], sizes: list[int], options: Any
    ) -> dist.Work:
        """Chunks of one tensor each."""
        arriving = _beside(arrived)
        work = self._gloo.alltoall_base(arriving, *_staged([sent]), coming, sizes, options)
        return _Arrival(work, [(arrived, arriving)])

    # PyTorch's names before 2.13.
    _allgather_base, alltoall_base = all_gather_single, all_to_all_single

    def send(self, tensors: list[torch.Tensor], rank: int, tag: int) -> dist.Work:
        """To one other."""
        return _Arrival(self._gloo.send(_staged(tensors), rank, tag), [])

    def recv(self, tensors: list[torch.Tensor], rank: int, tag: int) -> dist.Work:
        """From one other."""
        arriving = [_beside(tensor) for tensor in tensors]
        return _Arrival(self._gloo.recv(arriving, rank, tag), list(zip(tensors, arriving, strict=True)))

    def barrier(self, options: Any) -> dist.Work:
        """Wait for all."""
        return self._gloo.barrier(dist.BarrierOptions())

    def _in_place(
        self, tensors: Sequence[torch.Tensor], start: Callable[[list[torch.Tensor]], dist.Work]
    ) -> dist.Work:
        staged = _staged(tensors)
        return _Arrival(start(staged), list(zip(tensors, staged, strict=True)))


def _staged(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Copies in main memory: what is sent may be written to meanwhile."""
    return [tensor.to("cpu", copy=True, memory_format=torch.contiguous_format) for tensor in tensors]


def _beside(tensor: torch.Tensor) -> torch.Tensor:
    """Main memory for what arrives."""
    return torch.empty(tensor.shape, dtype=tensor.dtype)
