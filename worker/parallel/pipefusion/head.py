"""The part of a model behind its blocks: which elements of a picture it makes of which tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from worker.parallel.attention.kept_keys import Patches, Span
from worker.parallel.parts import Parts
from worker.parallel.plan import Blocks, PlanMismatch, Region
from worker.parallel.tokens import Arguments

Output = Any  # of a block: a tensor, or a tuple of tensors and None


class Elsewhere(nn.Module):
    """In place of a block that does not run here: an output, whatever it is called with."""

    def __init__(self, output: Callable[[], Output]):
        super().__init__()
        self._output = output

    def forward(self, *_: Any, **__: Any) -> Output:
        """What the block would return."""
        return self._output()


class Passing(nn.Module):
    """In place of a whole list of blocks that runs elsewhere and whose output nobody reads here.

    What comes behind it may go by how many tokens it returns: those of this rank, as its blocks would. What
    they are does not matter.

    Args:
        block: one of the list.
        parts: of the present call.
    """

    def __init__(self, block: nn.Module, plan: Blocks, region: Region, name: str, parts: Parts):
        super().__init__()
        self._arguments, self._plan, self._parts = Arguments(block, plan, region, name), plan, parts

    def argument(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One of those that a block is called with."""
        return self._arguments.named(args, kwargs)[name]

    def forward(self, *args: Any, **kwargs: Any) -> Output:
        """Its own arguments."""
        values = self._arguments.named(args, kwargs)
        passed = {
            carrier.streams: self._parts.take(carrier, values.get(name))
            for name, carrier in self._plan.cut.items()
        }
        passed |= {streams: values[name] for name, streams in self._plan.carries.items() if name in values}
        found = tuple(passed.get(_streams(carrier)) for carrier in self._plan.returns)
        return found[0] if len(found) == 1 else found


@dataclass(frozen=True)
class Leaving:
    """One tensor that leaves the region.

    Args:
        like: without content.
        dim, first: where the patched stream is in it; none where it is not.
    """

    like: torch.Tensor
    device: torch.device
    dim: int = 0
    first: int | None = None

    def probe(self, span: Span) -> torch.Tensor:
        """Zeros, and NaN in the tokens of a span."""
        result = torch.zeros_like(self.like, device=self.device)
        if self.first is not None:
            result.narrow(self.dim, self.first + span[0], span[1] - span[0]).fill_(float("nan"))
        return result


class Head:
    """Of one model.

    Args:
        lists: its lists of blocks; `passing` stands in place of each.
        patched: the stream that is cut into patches.
    """

    def __init__(
        self,
        name: str,
        region: Region,
        lists: list[nn.ModuleList],
        passing: list[Passing],
        patched: str,
    ):
        self._name, self._region, self._lists, self._patched = name, region, lists, patched
        self._passing = passing
        self._leaving: dict[int, Any] = {}  # by rows, as their last block returned it

    def forget(self) -> None:
        """Another run has other shapes."""
        self._leaving.clear()

    def see(self, rows: int, output: Output, parts: Parts) -> None:
        """What leaves the region in a call with all tokens."""
        if rows in self._leaving:
            return
        *_, plan = self._region.blocks.values()
        if isinstance(output, torch.Tensor):
            self._leaving[rows] = self._of(plan.returns[0], output, parts)
        else:
            found = zip(plan.returns, output, strict=True)
            self._leaving[rows] = tuple(self._of(carrier, tensor, parts) for carrier, tensor in found)

    def owners(self, forward: Callable[[], torch.Tensor], patches: Patches, rows: int) -> torch.Tensor:
        """For each element of one row of a picture the patch that it belongs to, (elements,) of int64.

        NaN in the tokens of a patch, and nowhere else, comes out where the patch is.

        Args:
            forward: calls the model; gives (B, ...).

        Raises:
            PlanMismatch: the head mixes tokens.
        """
        found: torch.Tensor | None = None
        for number, span in enumerate(patches.spans):
            leaving = self._leaving[rows]
            if isinstance(leaving, tuple):
                output = tuple(one and one.probe(span) for one in leaving)
            else:
                output = leaving.probe(span)
            with self._alone(output):
                own = forward().isnan().any(0).flatten()
            found = torch.full_like(own, -1, dtype=torch.long) if found is None else found
            if bool((found[own] >= 0).any()):
                raise PlanMismatch(f"the head of {self._name} mixes tokens: behind it patches overlap")
            found[own] = number
        if bool((found < 0).any()):
            raise PlanMismatch(f"parts of a picture of {self._name} are made of none of its tokens")
        return found

    def _of(self, carrier: Any, tensor: torch.Tensor | None, parts: Parts) -> Leaving | None:
        if tensor is None:
            return None
        like = tensor.to("meta")
        names, dim = _streams(carrier).split(), getattr(carrier, "dim", 1)
        if self._patched not in names:
            return Leaving(like, tensor.device)
        whole = self._region.gather.split()
        before = [parts[name] for name in names[: names.index(self._patched)]]
        first = sum(
            part.length if name in whole else part.size for name, part in zip(names, before, strict=False)
        )
        return Leaving(like, tensor.device, dim, first)

    @contextmanager
    def _alone(self, output: Output) -> Iterator[None]:
        """Within, the blocks of the last list return this, and there are no others."""
        held = [list(blocks) for blocks in self._lists]
        for blocks, passing in zip(self._lists, self._passing, strict=True):
            del blocks[:]
            blocks.append(passing)
        del self._lists[-1][:]
        self._lists[-1].extend(Elsewhere(lambda: output) for _ in held[-1])
        try:
            yield
        finally:
            for blocks, own in zip(self._lists, held, strict=True):
                del blocks[:]
                blocks.extend(own)


def _streams(carrier: Any) -> str:
    """Of an output of a block; "" of one that is not read."""
    return carrier if isinstance(carrier, str) else getattr(carrier, "streams", "")
