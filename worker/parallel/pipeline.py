"""Tensors on their way between the stages of a pipeline, from rank to rank."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from worker.clock import communication
from worker.parallel.mesh import arrive


class Pipeline:
    """The stages before and behind this rank, among the ranks of one pipeline.

    A send never waits for its receiver, which on gloo (and for large tensors on NCCL) it would: two ranks
    that send to each other would wait for ever (S7). Shapes are known on both sides and not exchanged.
    Each direction has a process group of its own, so that under NCCL, where sends and receives between
    two ranks are done in their order, the way back does not wait for the way forward.

    Args:
        pipelines: ranks of every pipeline of the group, stage after stage; all ranks give the same.
        timeout: how long a tensor may be on its way.
    """

    def __init__(
        self, pipelines: Sequence[Sequence[int]], rank: int, device: torch.device, timeout: timedelta
    ):
        self._device = device
        self._on_way: deque[list[tuple[dist.Work, torch.Tensor]]] = deque([[]])
        for ranks in pipelines:
            forward, back = (dist.new_group(list(ranks), timeout=timeout) for _ in range(2))
            if rank in ranks:
                self._ranks, self._forward, self._back = list(ranks), forward, back
        self.stage, self.stages = self._ranks.index(rank), len(self._ranks)

    @property
    def is_first(self) -> bool:
        """Whether this rank has the first blocks."""
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        """Whether this rank has the last blocks."""
        return self.stage == self.stages - 1

    def send(self, tensor: torch.Tensor) -> None:
        """To the next stage."""
        self._send(tensor, self._ranks[self.stage + 1], self._forward)

    def receive(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """From the stage before."""
        return self._receive(shape, dtype, self._ranks[self.stage - 1], self._forward)

    def send_back(self, tensor: torch.Tensor) -> None:
        """From the last stage to the first."""
        self._send(tensor, self._ranks[0], self._back)

    def receive_back(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """In the first stage, from the last."""
        return self._receive(shape, dtype, self._ranks[-1], self._back)

    def tell(self, known: Any) -> None:
        """Plain data to the next stage: once, what it cannot know."""
        content = torch.frombuffer(bytearray(json.dumps(known).encode()), dtype=torch.uint8)
        self.send(torch.tensor([len(content)], device=self._device))
        self.send(content.to(self._device))

    def told(self) -> Any:
        """What the stage before tells."""
        length = int(self.receive((1,), torch.long))
        return json.loads(bytes(self.receive((length,), torch.uint8).tolist()))

    def next_evaluation(self) -> None:
        """What was sent two evaluations ago has been received: everything since depends on it."""
        self._on_way.append([])
        while len(self._on_way) > 2:
            arrive(work for work, _ in self._on_way.popleft())

    def settle(self) -> None:
        """Wait until everything sent has been received."""
        while self._on_way:
            arrive(work for work, _ in self._on_way.popleft())
        self._on_way.append([])

    def _send(self, tensor: torch.Tensor, rank: int, group: dist.ProcessGroup) -> None:
        if not tensor.numel():
            return
        tensor = tensor.contiguous()
        with communication:
            self._on_way[-1].append((dist.isend(tensor, rank, group=group), tensor))

    def _receive(
        self, shape: Sequence[int], dtype: torch.dtype, rank: int, group: dist.ProcessGroup
    ) -> torch.Tensor:
        tensor = torch.empty(tuple(shape), dtype=dtype, device=self._device)
        if tensor.numel():
            with communication:
                dist.recv(tensor, rank, group=group)
        return tensor
