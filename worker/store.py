"""The models in this rank's memory: several, while there is room; the least recently used goes first."""

from __future__ import annotations

import ctypes
import gc
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import torch

from comfy_xdit.protocol.spec import ModelSpec

BUDGET = "XDIT_MODEL_BYTES"  # environment: bytes of models a rank may keep, instead of the share below
CPU_SHARE = 0.5  # of the machine's memory, over all ranks of a group
GPU_WORKING_SHARE = 0.1  # of a GPU's memory stays free for what a step computes
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


class Model(Protocol):
    """What is kept."""

    nbytes: int  # known before the weights are read

    def load(self) -> None: ...


class ModelStore:
    """Keeps models and makes room for new ones.

    Args:
        open_model: opens a spec, which finds everything that can be wrong with it, and reads no weight.
    """

    def __init__(self, device: torch.device, world_size: int, open_model: Callable[[ModelSpec], Model]):
        self._device, self._open = device, open_model
        self._budget = _budget(device, world_size)
        self._models: OrderedDict[ModelSpec, Model] = OrderedDict()
        self.loads = 0  # how many models were ever read from disk

    def require(
        self, spec: Any, open_model: Callable[[], Model] | None = None, keep: ModelSpec | None = None
    ) -> Model:
        """The loaded model of this spec; `open_model` opens it in place of the store's own.

        What is loaded beside a model must not cost that model: `keep`.

        A file is checked before a model makes room for it, and read after: a bad file costs nothing
        that is loaded, and what goes is gone before the new one comes.
        """
        if spec not in self._models:
            model = self._open(spec) if open_model is None else open_model()
            self.make_room(model.nbytes, keep)
            model.load()
            self.loads += 1
            self._models[spec] = model
        self._models.move_to_end(spec)
        return self._models[spec]

    def get(self, spec: ModelSpec) -> Model | None:
        """The model of this spec if it is loaded."""
        return self._models.get(spec)

    def touch(self, spec: Any) -> None:
        """Have others go first when room is needed."""
        if spec in self._models:
            self._models.move_to_end(spec)

    @property
    def specs(self) -> tuple[Any, ...]:
        """Of all that is loaded."""
        return tuple(self._models)

    def drop(self, specs: Iterable[ModelSpec] | None) -> None:
        """Let go of `specs`, or of all."""
        gone = [self._models.pop(s, None) for s in (list(self._models) if specs is None else specs)]
        if any(model is not None for model in gone):
            gone.clear()
            give_back(self._device)

    def report(self) -> dict[str, Any]:
        """Plain values: what is loaded, how large it is, how much room is left."""
        return {
            "models": [
                {"name": Path(s.path).name, "kind": s.kind, "bytes": m.nbytes}
                for s, m in self._models.items()
            ],
            "bytes": self._bytes(),
            "room": self._room(),
            "loads": self.loads,
        }

    def make_room(self, needed: int, keep: ModelSpec | None = None) -> bool:
        """Drop the least recently used, but not `keep`, until `needed` bytes fit. Returns whether they do."""
        while self._room() < needed and (others := [spec for spec in self._models if spec != keep]):
            self.drop(others[:1])
        return self._room() >= needed

    def _room(self) -> int:
        if self._budget is not None:
            return self._budget - self._bytes()
        free, total = torch.cuda.mem_get_info(self._device)
        unused = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return free + unused - int(GPU_WORKING_SHARE * total)

    def _bytes(self) -> int:
        return sum(model.nbytes for model in self._models.values())


def _budget(device: torch.device, world_size: int) -> int | None:
    """Bytes of models this rank may keep; None on a GPU, where what is free is asked for."""
    if BUDGET in os.environ:
        return int(os.environ[BUDGET])
    if device.type == "cuda":
        return None
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if _CGROUP_LIMIT.is_file() and (limit := _CGROUP_LIMIT.read_text().strip()).isdigit():
        memory = min(memory, int(limit))
    return int(CPU_SHARE * memory / world_size)


def give_back(device: torch.device) -> None:
    """Have memory that nobody uses return to the system: modules and their hooks are cycles."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # glibc keeps freed memory otherwise
        libc.malloc_trim(0)
