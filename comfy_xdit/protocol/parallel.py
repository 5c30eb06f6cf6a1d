"""How many ranks there are and what each degree of parallelism is, in xfuser's spelling."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, fields

from comfy_xdit.protocol.errors import InvalidInput, counted

DEGREES = (
    "data_parallel_degree",
    "cfg_parallel_degree",
    "ulysses_degree",
    "ring_degree",
    "pipefusion_degree",
)


@dataclass(frozen=True)
class ParallelConfig:
    """One layout of ranks. The product of the degrees is the number of ranks.

    `devices` names one device per rank: "cuda:0", ... or "cpu". Empty means the first
    `world_size` devices the machine offers. With `shard_weights` the ranks that would have the same
    weights keep a part of them each. `warmup_steps` belongs to a run, not to the ranks: layouts
    that differ in it alone are equal, and share one group.
    """

    data_parallel_degree: int = 1
    cfg_parallel_degree: int = 1
    ulysses_degree: int = 1
    ring_degree: int = 1
    pipefusion_degree: int = 1
    warmup_steps: int = field(default=1, compare=False)
    shard_weights: bool = False
    devices: tuple[str, ...] = ()

    @property
    def world_size(self) -> int:
        """Number of ranks: the product of all degrees."""
        return math.prod(getattr(self, name) for name in DEGREES)

    @property
    def sequence_parallel_degree(self) -> int:
        """Ranks that share one sequence of tokens (Ulysses x Ring, USP)."""
        return self.ulysses_degree * self.ring_degree

    @property
    def shares_weights(self) -> bool:
        """Whether some ranks have the same blocks: all but the stages of a pipeline do."""
        return self.world_size > self.pipefusion_degree

    def describe(self) -> str:
        """The factors that are not 1, e.g. `ulysses_degree 2 x ring_degree 2 = 4, sharded weights`."""
        return self._factors() + (", sharded weights" if self.shard_weights else "")

    def _factors(self) -> str:
        factors = [f"{n} {getattr(self, n)}" for n in DEGREES if getattr(self, n) != 1]
        return f"{' x '.join(factors)} = {self.world_size}" if factors else "one rank"

    def check(self, available: tuple[str, ...]) -> ParallelConfig:
        """Return this layout with its devices filled in.

        Args:
            available: the devices a rank may be put on, e.g. ("cuda:0", "cuda:1").

        Raises:
            InvalidInput: a degree below 1, no warm-up for PipeFusion, nobody to share weights with, or
                degrees that do not fit the devices.
        """
        for name in DEGREES:
            degree = getattr(self, name)
            if degree < 1:
                raise InvalidInput(f"{name} is {degree}; a degree is at least 1. Set it to 1 or more.")
        if self.cfg_parallel_degree > 2:
            raise InvalidInput(
                f"cfg_parallel_degree is {self.cfg_parallel_degree}; guidance has two branches, "
                "positive and negative. Set it to 1 or 2."
            )
        if self.pipefusion_degree > 1 and self.warmup_steps < 1:
            raise InvalidInput(
                f"warmup_steps is {self.warmup_steps}; PipeFusion's patches need the keys and values of one "
                "whole step at least. Set it to 1 or more."
            )
        if self.shard_weights and not self.shares_weights:
            raise InvalidInput(
                f"shard_weights spreads weights over ranks that have the same blocks; of {self._factors()} "
                "no two have. Set shard_weights to false, or another degree than pipefusion_degree to 2."
            )
        devices = self.devices or available[: self.world_size]
        if self.world_size != len(devices):
            selected = counted(len(devices), "device") + (" is" if len(devices) == 1 else " are")
            raise InvalidInput(
                f"{self._factors()}, but {selected} selected "
                f"({', '.join(devices) or 'none'}); set the degrees so that their product is "
                f"{len(devices)}, or choose other devices."
            )
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return ParallelConfig(**{**values, "devices": tuple(devices)})


def parse_devices(text: str, available: tuple[str, ...]) -> tuple[str, ...]:
    """Read a devices widget: "" = none chosen, "0,1", "cuda:0, cuda:1" or "cpu, cpu".

    Raises:
        InvalidInput: a device that this machine does not offer, or one named twice.
    """
    chosen = []
    for word in text.replace(";", ",").split(","):
        name = word.strip()
        if not name:
            continue
        device = f"cuda:{name}" if name.isdigit() else name
        if device != "cpu" and device not in available:
            raise InvalidInput(
                f"device {name!r} is not one of {', '.join(sorted(set(available)))}; "
                "name devices of this machine, separated by commas, or leave the field empty."
            )
        if device != "cpu" and device in chosen:
            raise InvalidInput(f"device {device} is named twice, and each rank needs its own; name it once.")
        chosen.append(device)
    return tuple(chosen)


def rank_threads(world_size: int) -> int:
    """Threads one of `world_size` CPU ranks computes with."""
    return int(os.environ.get("XDIT_OMP_NUM_THREADS") or max(1, (os.cpu_count() or 1) // world_size))


def available_devices() -> tuple[str, ...]:
    """The devices ranks may use: every GPU this process may see, else CPU ranks (at most 8)."""
    import torch

    if torch.cuda.is_available():
        return tuple(f"cuda:{i}" for i in range(torch.cuda.device_count()))
    return ("cpu",) * 8


@dataclass(frozen=True)
class Automatic:
    """Strategy `auto`: the loader chooses the layout, when it knows the model (comfy_xdit/planning/auto.py).

    `devices` are those it may use; empty means all the machine offers. With `shard_weights` it chooses
    among layouts that spread the weights; without, it takes those where whole weights do not fit.
    """

    devices: tuple[str, ...] = ()
    shard_weights: bool = False
