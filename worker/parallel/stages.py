"""Which blocks of a transformer each stage of a pipeline has, and what is left of the model there."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import accumulate

from torch import nn

from comfy_xdit.protocol.errors import InvalidInput
from worker.models.base import StageParts


def divide(weights: Sequence[int], stages: int) -> list[range]:
    """Cut a row of weights into `stages` runs so that the heaviest is as light as it can be.

    Every run has one element at least, so there must not be more stages than weights.
    """
    until = [0, *accumulate(weights)]

    @cache
    def best(start: int, left: int) -> tuple[int, int]:
        """The heaviest of `left` runs from `start` on, and where the first of them ends."""
        if left == 1:
            return until[-1] - until[start], len(weights)
        ends = range(start + 1, len(weights) - left + 2)
        return min((max(until[end] - until[start], best(end, left - 1)[0]), end) for end in ends)

    runs, start = [], 0
    for left in range(stages, 0, -1):
        end = best(start, left)[1]
        runs.append(range(start, end))
        start = end
    return runs


class Stage:
    """One stage of a transformer. What other stages have is taken out of the module.

    Args:
        module: the whole transformer, its weights not read yet.
        index, count: this stage, of so many.

    Raises:
        InvalidInput: more stages than blocks.
    """

    def __init__(self, module: nn.Module, parts: StageParts, family: str, index: int, count: int):
        self.is_first, self.is_last = index == 0, index == count - 1
        places = parts.names(module)
        if count > len(places):
            raise InvalidInput(
                f"pipefusion_degree {count} is more than the {len(places)} blocks of this {family}, and "
                f"every stage needs one; set pipefusion_degree to {len(places)} or less."
            )
        weights = [_parameters(module.get_submodule(place)) for place in places]
        self.runs = divide(weights, count)
        self.names: list[str] = []
        for number, place in enumerate(places):
            if number in self.runs[index]:
                self.names.append(place)
            else:
                name, _, i = place.rpartition(".")
                module.get_submodule(name)[int(i)] = nn.Identity()
        for name in (() if self.is_first else parts.first) + (() if self.is_last else parts.last):
            setattr(module, name, nn.Identity())


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
