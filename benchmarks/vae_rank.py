"""A rank that says how many bytes of tensors it needed at most: for benchmarks/vae.py."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from comfy_xdit.protocol.messages import Decode, Encode, Ready
from comfy_xdit.protocol.parallel import ParallelConfig
from comfy_xdit.protocol.rpc import Invitation, Rank
from worker.__main__ import run
from worker.engine import Engine
from worker.loop import Run, serve
from worker.parallel.groups import Degrees, RankGroups


class PeakBytes(TorchDispatchMode):
    """Adds up the storages that operations make while they live; weights and inputs were there before."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if _is_tensor(leaf)}
        result = operation(*args, **(kwargs or {}))
        self._alive = {k: entry for k, entry in self._alive.items() if not entry[0].expired()}
        for leaf in filter(_is_tensor, tree_leaves(result)):
            storage = leaf.untyped_storage()
            if storage._cdata not in known and storage._cdata not in self._alive:
                self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self._alive.values()))
        return result


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor)


class MeasuringEngine(Engine):
    """The engine; its answers about pictures also say the largest peak among the ranks."""

    def handlers(self) -> dict[type, Any]:
        """Those of the engine, with Decode and Encode measured."""
        return super().handlers() | {Decode: self._measured(self.decode), Encode: self._measured(self.encode)}

    def _measured(self, work: Any) -> Any:
        def handler(message: Decode | Encode, asked: Run) -> dict[str, Any] | None:
            self._require(message.spec)  # loading is not what is measured
            with PeakBytes() as counter:
                answer = work(message, asked)
            peak = torch.tensor(counter.peak)
            if self._groups.everyone is not None:
                dist.all_reduce(peak, dist.ReduceOp.MAX, group=self._groups.everyone)
            return None if answer is None else answer | {"peak": peak.item()}

        return handler


def _program(end: Rank, invitation: Invitation) -> None:
    groups = RankGroups(end, Degrees.of(ParallelConfig(**invitation.degrees)), torch.device("cpu"))
    engine = MeasuringEngine(groups)
    end.send(0, Ready(engine.report()))
    serve(end, engine.handlers(), groups.device, groups.agree)


if __name__ == "__main__":
    run(_program)
