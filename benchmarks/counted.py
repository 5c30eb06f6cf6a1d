"""A rank of the engine that counts what it sends to other ranks. Run by benchmarks/traffic.py.

Counted are the operations of torch.distributed themselves, under the call of the transformer. After each
call the rank writes bytes by operation to COUNTS/RANK.json.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from comfy_xdit.protocol.messages import Denoise, Ready, Sample
from comfy_xdit.protocol.parallel import ParallelConfig
from comfy_xdit.protocol.rpc import Invitation, Rank
from worker.__main__ import run

COUNTS = "XDIT_COUNTS"  # environment: the folder to write to
NAMESPACES = ("c10d", "_c10d_functional")
WAITING = ("wait_tensor", "wrap_tensor", "barrier", "recv")  # operations that send nothing


class Sent(TorchDispatchMode):
    """Bytes this rank sends, by operation. A collective sends each other rank its part once."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        if namespace in NAMESPACES and not any(word in name for word in WAITING):
            self.bytes[name.strip("_")] += _sent(name, args)
        return func(*args, **(kwargs or {}))


def _sent(name: str, args: Any) -> int:
    size = _size(args)
    if "all_to_all" in name or "alltoall" in name:
        tensor = args[0] if name.startswith("all_to_all") else args[1]
        return _nbytes(tensor) * (size - 1) // size
    if "gather" in name:
        # The functional form takes the part first, the other one the place for the whole.
        part = args[0] if name.startswith("all_gather_into") else args[1]
        return _nbytes(part) * (size - 1)
    if "reduce" in name:
        return 2 * _nbytes(args[0]) * (size - 1) // size
    if name.startswith(("send", "broadcast")):
        return _nbytes(args[0])
    raise NotImplementedError(f"no rule for what {name} sends")


def _size(args: Any) -> int:
    """Ranks in the group among the arguments: an object in one form of operations, a name in the other."""
    for value in args:
        if isinstance(value, str) and value.isdigit():
            return dist.distributed_c10d._resolve_process_group(value).size()
        if isinstance(value, torch.ScriptObject):
            try:
                return dist.ProcessGroup.unbox(value).size()
            except RuntimeError:  # another kind of object: the operation of a reduction
                continue
    return dist.get_world_size()


def _nbytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(_nbytes(part) for part in value)


def _counting(handler: Callable[..., Any], file: Path) -> Callable[..., Any]:
    def handle(*args: Any) -> Any:
        with Sent() as sent:
            answer = handler(*args)
        file.write_text(json.dumps(sent.bytes))
        return answer

    return handle


def _engine(end: Rank, invitation: Invitation) -> None:
    from worker.engine import Engine
    from worker.loop import serve
    from worker.parallel.groups import Degrees, RankGroups

    device = torch.device("cpu")
    groups = RankGroups(end, Degrees.of(ParallelConfig(**invitation.degrees)), device)
    engine = Engine(groups)
    file = Path(os.environ[COUNTS]) / f"{end.rank}.json"
    handlers = engine.handlers()
    handlers |= {kind: _counting(handlers[kind], file) for kind in (Denoise, Sample)}
    end.send(0, Ready(engine.report()))
    serve(end, handlers, device, groups.agree)


if __name__ == "__main__":
    run(_engine)
