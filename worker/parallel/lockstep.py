"""A mesh whose ranks tell each other what they are about to exchange, so that none waits for one that failed.

For a model that is not trusted yet: it may raise on one rank alone, or exchange something else on each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from worker.parallel.mesh import Mesh


class OutOfStep(RuntimeError):
    """Another rank failed, or does not exchange what this one does."""


def _alone(_word: str) -> bool:
    return False


@dataclass(frozen=True)
class Lockstep(Mesh):
    """As the mesh it is made of.

    Args:
        differ: whether the ranks say different words; all ranks ask at once, and all hear the same.
    """

    differ: Callable[[str], bool] = _alone

    @classmethod
    def of(cls, mesh: Mesh, differ: Callable[[str], bool]) -> Lockstep:
        """The same ranks and groups."""
        groups = mesh.ulysses_group, mesh.ring_group, mesh.group
        return cls(mesh.ulysses, mesh.ring, mesh.rank, *groups, differ=differ)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Within, all ranks make the same exchanges, or all leave.

        Raises:
            OutOfStep: another rank has failed, has ended, or exchanges something else.
        """
        try:
            yield
        except OutOfStep:  # all have heard
            raise
        except BaseException:
            self.differ("failed")
            raise
        self._meet("done")

    def exchange(self, sent: torch.Tensor, sizes: Sequence[int], coming: Sequence[int]) -> torch.Tensor:
        """As of Mesh."""
        self._meet(f"exchange {sent.dtype}")
        return super().exchange(sent, sizes, coming)

    def pass_on(self, block: torch.Tensor, arriving: torch.Tensor) -> list[dist.Work]:
        """As of Mesh."""
        self._meet(f"pass on {block.dtype}, {block.shape[:3]}, {block.shape[4:]}")
        return super().pass_on(block, arriving)

    def neighbours(self, top: torch.Tensor, bottom: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """As of Mesh."""
        self._meet(f"neighbours {top.dtype}, {top.shape}, {bottom.shape}")
        return super().neighbours(top, bottom)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """As of Mesh."""
        self._meet(f"sum {tensor.dtype}, {tensor.shape}")
        return super().sum(tensor)

    def gather(self, part: torch.Tensor, sizes: Sequence[int], dim: int) -> list[torch.Tensor]:
        """As of Mesh."""
        shape = list(part.shape)
        del shape[dim]
        self._meet(f"gather {part.dtype}, {shape}, {sizes}")
        return super().gather(part, sizes, dim)

    def _meet(self, word: Any) -> None:
        if self.differ(word):
            raise OutOfStep(f"another rank refused, or had no part in this: {word}")
