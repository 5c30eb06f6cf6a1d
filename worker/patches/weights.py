"""The patches of a loaded model: what the host has sent, and what the weights have now.

No copy of a patched weight is kept: its base is read from the file again, a memory map.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Set
from itertools import groupby
from typing import Protocol

import torch

from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.messages import Keep, Known, Patch, PatchSet
from worker.checkpoints import Checkpoint, Dtype, Source
from worker.patches.adapters import Tensors, patched
from worker.patches.lora_files import FileTensor, LoraFiles

Weights = dict[str, tuple[Patch, ...]]
COMPUTE_DTYPE = torch.float32


class PatchStore:
    """Sets the host has sent, by name. Their tensors lie in main memory, each once."""

    def __init__(self) -> None:
        self._sets: dict[str, Weights] = {"": {}}
        self._tensors: dict[str, torch.Tensor] = {}

    def take(self, message: PatchSet) -> None:
        """Keep what the message brings, and then drop what it names."""
        if message.weights is not None:
            self._sets[message.name] = {
                key: tuple(self._keep(patch) for patch in patches) for key, patches in message.weights.items()
            }
        for name in message.forget:
            self._sets.pop(name, None)
        if message.forget:
            used = {t.name for s in self._sets.values() for ps in s.values() for t in _parts(ps)}
            self._tensors = {name: t for name, t in self._tensors.items() if name in used}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def weights(self, name: str) -> Weights:
        """The patches of a set by weight; their tensors are `Known`."""
        return self._sets[name]

    def tensors(self, patch: Patch, device: torch.device) -> Tensors:
        """The tensors of a patch, to compute with; those of a file are read from it each time."""
        return {part: self._read(tensor).to(device, COMPUTE_DTYPE) for part, tensor in patch.tensors.items()}

    def _read(self, tensor: Known | FileTensor) -> torch.Tensor:
        return tensor.read() if isinstance(tensor, FileTensor) else self._tensors[tensor.name]

    def _keep(self, patch: Patch) -> Patch:
        for tensor in patch.tensors.values():
            if isinstance(tensor, Keep):
                self._tensors[tensor.name] = tensor.tensor.cpu()
        names = {part: Known(tensor.name) for part, tensor in patch.tensors.items()}
        return Patch(**{**vars(patch), "tensors": names})


class Weight(Protocol):
    """What a patched weight is written to: a tensor, or this rank's part of one."""

    @property
    def device(self) -> torch.device: ...

    def copy_(self, tensor: torch.Tensor, /) -> object: ...


class PatchedModel(ABC):
    """A model whose weights have the patches of one set.

    Args:
        known: native names of every weight of the model, also those that other ranks have.
        held: those that this rank has.
        loras: what patches of the kind `file` stand for.
    """

    def __init__(self, known: Set[str], held: Set[str], loras: LoraFiles):
        self._known, self._held, self._loras = known, held, loras
        self._name, self._applied = "", dict[str, tuple[Patch, ...]]()

    def apply(self, name: str, store: PatchStore) -> int:
        """Have the patches of the set `name`, and no other. Returns how many weights were written.

        Raises:
            InvalidInput: a patch for a weight the model lacks, or of another shape.
        """
        if name == self._name:
            return 0
        wanted = self._loras.expand(store.weights(name))
        unknown = sorted(wanted.keys() - self._known)
        if unknown:
            raise InvalidInput(
                f"a patch is for {unknown[0]}, which this model lacks; "
                "choose a LoRA file made for this model."
            )
        wanted = {key: patches for key, patches in wanted.items() if key in self._held}
        changed = [key for key in {**self._applied, **wanted} if wanted.get(key) != self._applied.get(key)]
        self._name = None  # in between, and after an error, it is no set
        for key in self.write(changed, wanted, store):
            self._applied.pop(key, None)
            if key in wanted:
                self._applied[key] = wanted[key]
        self._name = name
        return len(changed)

    @abstractmethod
    def write(self, changed: list[str], wanted: Weights, store: PatchStore) -> Iterator[str]:
        """Give each weight its patches, or what the file says where it has none. Yields those done."""


class PatchedWeights(PatchedModel):
    """The weights of a diffusers class.

    Args:
        weights: by diffusers name what this rank has; written in place.
        native: where each of them is in the original release's naming, which patches use.
        checkpoint: the file, and `mapping`: where each of them is in it.
        dtype: what the file's tensors are cast to, one for all or of each.
        loras: as of PatchedModel.
    """

    def __init__(
        self,
        weights: dict[str, Weight],
        native: dict[str, Source],
        checkpoint: Checkpoint,
        mapping: dict[str, Source],
        dtype: Dtype,
        loras: LoraFiles,
    ):
        self._weights, self._checkpoint, self._mapping, self._dtype = weights, checkpoint, mapping, dtype
        self._pieces: dict[str, list[tuple[str, Source]]] = {}
        for name, source in native.items():
            self._pieces.setdefault(source.key, []).append((name, source))
        for pieces in self._pieces.values():
            pieces.sort(key=lambda piece: piece[1].start or 0)
        held = {key for key, pieces in self._pieces.items() if pieces[0][0] in weights}
        super().__init__(self._pieces.keys(), held, loras)

    def write(self, changed: list[str], wanted: Weights, store: PatchStore) -> Iterator[str]:
        """As of PatchedModel."""
        for key, base in self._read(changed):
            self._write(key, base, wanted.get(key, ()), store)
            yield key

    def _read(self, keys: list[str]):
        """The base of each weight as the pieces the model has, from the file."""
        owner = {name: key for key in keys for name, _ in self._pieces[key]}
        wanted = {name: self._mapping[name] for name in owner}
        stream = self._checkpoint.stream(wanted, self._dtype)
        for key, pieces in groupby(stream, key=lambda piece: owner[piece[0]]):
            yield key, dict(pieces)

    def _write(
        self, key: str, base: dict[str, torch.Tensor], patches: tuple[Patch, ...], store: PatchStore
    ) -> None:
        pieces = self._pieces[key]
        if patches:
            device = self._weights[pieces[0][0]].device
            whole = torch.cat([_swapped(base[name], source) for name, source in pieces])
            whole = whole.to(device, COMPUTE_DTYPE)  # a copy already, so that it may be written to
            whole = patched(key, whole, patches, lambda patch: store.tensors(patch, device))
            base = {name: _swapped(whole[source.start : source.stop], source) for name, source in pieces}
        for name, tensor in base.items():
            self._weights[name].copy_(tensor)


def _swapped(tensor: torch.Tensor, source: Source) -> torch.Tensor:
    return torch.cat(tensor.chunk(2)[::-1]) if source.swap else tensor


def _parts(patches: tuple[Patch, ...]) -> list[Known]:
    return [known for patch in patches for known in patch.tensors.values()]
