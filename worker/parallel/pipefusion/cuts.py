"""Which blocks of a model each stage of a pipeline has, and whose outputs travel between stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate

from torch import nn

from worker.parallel.plan import WHOLE, Attend, Grid, Plan, PlanMismatch, Region

REMEDY = "set pipefusion_degree to 1, and use ulysses_degree, ring_degree or cfg_parallel_degree instead"


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


@dataclass(frozen=True)
class Cuts:
    """The blocks of a model over stages.

    Args:
        places: names of all blocks in the order they run.
        runs: which of them every stage has.
        reads: for every block the earlier ones whose output it or its forward reads.
    """

    places: tuple[str, ...]
    runs: tuple[range, ...]
    reads: tuple[frozenset[int], ...]

    @classmethod
    def of(cls, module: nn.Module, plan: Plan, stages: int) -> Cuts:
        """As even in parameters as they go; `stages` at most the number of blocks."""
        region = region_of_patches(plan, type(module).__name__)
        lists = {name: module.get_submodule(name) for name in region.blocks}
        places = tuple(block_names(module, plan))
        weights = [_parameters(block) for blocks in lists.values() for block in blocks]
        count, reads = len(places), []
        for i in range(count):
            skip = plan.skips(i, count) if plan.skips else None
            reads.append(frozenset({i - 1} if skip is None else {i - 1, skip}))
        return cls(places, tuple(divide(weights, stages)), tuple(reads))

    def names(self, stage: int) -> list[str]:
        """The blocks of a stage."""
        return [self.places[number] for number in self.runs[stage]]

    def across(self, stage: int) -> list[int]:
        """The blocks whose outputs enter a stage: also those that a stage behind it reads."""
        start = self.runs[stage].start
        read = {number for reader in range(start, len(self.places)) for number in self.reads[reader]}
        return sorted(number for number in read if 0 <= number < start)


def block_names(module: nn.Module, plan: Plan) -> list[str]:
    """All blocks of a model in the order they run."""
    lists = [name for region in plan.regions for name in region.blocks]
    return [f"{name}.{i}" for name in lists for i in range(len(module.get_submodule(name)))]


def region_of_patches(plan: Plan, name: str) -> Region:
    """The region that patches of a picture can enter one by one.

    Raises:
        PlanMismatch: the plan says that they cannot, and why.
    """
    why = _obstacle(plan)
    if why:
        raise PlanMismatch(f"PipeFusion cannot cut a picture of {name} into patches: {why}; {REMEDY}")
    # Nothing is added to tokens behind the last block (ControlNets are refused), where its returns are known.
    return replace(plan.regions[0], at="")


def _obstacle(plan: Plan) -> str:
    if len(plan.regions) != 1:
        return f"its blocks are in {len(plan.regions)} regions, between which a patch waits for all others"
    (region,) = plan.regions
    if region.each:
        return "every block sees all of its tokens"
    if region.halo or region.units:
        return "its blocks convolve over neighbouring tokens"
    if region.whole:
        return f"{', '.join(region.whole)} see all tokens"
    found = (one if isinstance(one, tuple) else (one,) for one in region.attention.values())
    attends = [attend for several in found for attend in several]
    if any(attend.linear or attend.counted for attend in attends):
        return "its attention is linear, or drops tokens: its keys and values cannot be kept"
    return _unpatched(plan.patched, region, attends)


def _unpatched(patched: str, region: Region, attends: Sequence[Attend]) -> str:
    first, *later = region.blocks.values()
    carriers = list(first.cut.values())
    if not patched or patched not in {getattr(carrier, "streams", "") for carrier in carriers}:
        return "its plan names no stream of tokens that is cut"
    if any(isinstance(carrier, (Grid, tuple)) for carrier in carriers) or any(plan.cut for plan in later):
        return "its streams enter as grids, as lists, or behind the first blocks"
    if any(WHOLE in f"{attend.query} {attend.keys}".split() for attend in attends):
        return "its blocks make tokens of their own"
    *_, last = region.blocks.values()
    returned = " ".join(one if isinstance(one, str) else getattr(one, "streams", "") for one in last.returns)
    if not set(region.gather.split()) <= set(returned.split()):
        return "its last block does not return what its head reads"
    return ""


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
