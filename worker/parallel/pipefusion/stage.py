"""A stage of a pipeline: the class's own forward with some of its blocks, on one patch of the picture or all.

Source: PipeFusion, arXiv:2405.14430; docs/decisions/007-pipefusion.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

import torch
from torch import nn

from comfy_xdit.protocol.errors import InvalidInput
from worker.parallel.attention.blockwise import WithLogSumExp
from worker.parallel.attention.kept_keys import KeptKeys, Patches
from worker.parallel.mesh import Mesh
from worker.parallel.pipefusion.cuts import Cuts, region_of_patches
from worker.parallel.pipefusion.head import Elsewhere, Head, Output, Passing
from worker.parallel.pipefusion.travel import Travel
from worker.parallel.pipeline import Pipeline
from worker.parallel.plan import Plan, PlanMismatch
from worker.parallel.tokens import SpreadTokens

Result = TypeVar("Result")


class Left(Exception):
    """The rest of the forward is of later stages."""


class Found(Exception):
    """The forward was called to learn one thing, which is known now."""


class Stage:
    """One stage of a model. Outputs of blocks travel; what is around and between blocks, all stages compute.

    What other stages have is taken out of the module. Blocks before the stage's first one become modules
    that return what has arrived; behind its last one the forward is left.

    Args:
        module: the whole transformer; its weights may be unread yet.
        family: how a person calls it.
        index, count: this stage, of so many.

    Raises:
        InvalidInput: more stages than blocks.
        PlanMismatch: the plan does not allow patches.
    """

    def __init__(self, module: nn.Module, plan: Plan, family: str, index: int, count: int, mesh: Mesh):
        name = type(module).__name__
        region = region_of_patches(plan, name)
        # Of a class whose models may lack one kind of blocks.
        lists = {name: one for name, one in region.blocks.items() if len(module.get_submodule(name))}
        self._region = replace(region, blocks=lists)
        blocks = sum(len(module.get_submodule(name)) for name in self._region.blocks)
        if count > blocks:
            raise InvalidInput(
                f"pipefusion_degree {count} is more than the {blocks} blocks of this {family}, and "
                f"every stage needs one; set pipefusion_degree to {blocks} or less."
            )
        plan = Plan((self._region,), plan.patched, plan.skips)
        self.patched = plan.patched
        self._index, self.cuts = index, Cuts.of(module, plan, count)
        self.is_first, self.is_last = index == 0, index == count - 1
        self.names = self.cuts.names(index)
        self._arriving = [] if self.is_first else self.cuts.across(index)
        self._leaving = [] if self.is_last else self.cuts.across(index + 1)
        self._tokens = SpreadTokens(module, plan, mesh)
        self._kept = self._tokens.exchange.kept = KeptKeys(mesh)
        self._lists = [module.get_submodule(place) for place in self._region.blocks]
        self._passing = [
            Passing(blocks[0], plan_of_list, self._region, name, self._tokens.parts)
            for blocks, plan_of_list in zip(self._lists, self._region.blocks.values(), strict=True)
        ]
        self._head = Head(name, self._region, self._lists, self._passing, plan.patched)
        self._watch([module.get_submodule(place) for place in self.names])
        self._take_out()
        self._forget()

    def use(self, kernel: WithLogSumExp | None) -> None:
        """An attention with log-sum-exp for the blocks of a ring."""
        self._tokens.exchange.kernel = kernel

    @contextmanager
    def run(self, pipeline: Pipeline) -> Iterator[None]:
        """Within, the stage is one of a pipeline. What it keeps of a picture is let go behind."""
        self._travel = Travel(pipeline)
        try:
            yield
        finally:
            self._forget()

    def whole(
        self, forward: Callable[[], Result], rows: int, patches: Patches | None = None
    ) -> Result | None:
        """One evaluation of some rows, of all tokens.

        Args:
            forward: calls the model with whole arguments.
            rows: number of these rows among those of one evaluation.
            patches: keys and values are kept for them, which come in the next evaluation.

        Returns:
            What the forward returns, in the last stage.
        """
        return self._evaluate(forward, rows, None, patches)

    def patch(self, forward: Callable[[], Result], rows: int, patches: Patches, number: int) -> Result | None:
        """One evaluation of one patch. What the last stage returns is valid where its tokens are."""
        return self._evaluate(forward, rows, number, patches)

    def length(self, forward: Callable[[], object]) -> int:
        """How many tokens of the stream that is cut into patches a call has. The blocks do not run.

        Args:
            forward: as in `whole`.
        """
        (blocks, *_), (plan, *_) = self._lists, self._region.blocks.values()
        argument = next(name for name, one in plan.cut.items() if one.streams == self.patched)
        found: list[int] = []

        def look(_block: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            found.append(self._passing[0].argument(argument, args, kwargs).shape[plan.cut[argument].dim])
            raise Found

        hook = blocks[0].register_forward_pre_hook(look, with_kwargs=True, prepend=True)
        try:
            forward()
        except Found:
            return found[0]
        finally:
            hook.remove()
        raise PlanMismatch("the forward of this model ran without its blocks")

    def owners(self, forward: Callable[[], torch.Tensor], patches: Patches, rows: int = 0) -> torch.Tensor:
        """In the last stage: for each element of one row of a picture the patch it belongs to.

        Args:
            forward: as in `whole`, of rows that were called; gives (B, ...).

        Returns:
            (elements of a row,), int64.

        Raises:
            PlanMismatch: the model's head mixes tokens.
        """
        self._tokens.spans = {}
        self._tokens.enter(self._lengths[rows])
        return self._head.owners(forward, patches, rows)

    # ------------------------------------------------------------------ one evaluation

    def _evaluate(
        self, forward: Callable[[], Result], rows: int, patch: int | None, patches: Patches | None
    ) -> Result | None:
        self._rows, self._tokens.spans = rows, {}
        self._kept.begin(rows, patch, patches)
        if not self.is_first:
            arrived, self._lengths[rows] = self._travel.receive((rows, patch))
            self._outputs = dict(zip(self._arriving, arrived, strict=True))
        if patch is not None:
            lengths = self._lengths[rows]
            self._tokens.spans = {name: patches.span(patch, name, size) for name, size in lengths.items()}
        if not self.is_first:
            self._tokens.enter(self._lengths[rows])
        try:
            return forward()
        except Left:
            self._travel.send((rows, patch), [self._outputs[i] for i in self._leaving], self._lengths[rows])
            return None
        finally:
            self._outputs = {}

    def _forget(self) -> None:
        self._kept.clear()
        self._travel: Travel | None = None
        self._rows, self._outputs = 0, {}
        self._lengths: dict[int, dict[str, int]] = {}  # by rows: tokens of each stream
        self._head.forget()

    # ------------------------------------------------------------------ blocks

    def _watch(self, blocks: Sequence[nn.Module]) -> None:
        """Hooks behind those of SpreadTokens."""
        first, last = self.cuts.runs[self._index][0], self.cuts.runs[self._index][-1]
        if self.is_first:
            blocks[0].register_forward_pre_hook(lambda *_: self._measure())
        for number, block in enumerate(blocks, first):
            if number in self._leaving:
                block.register_forward_hook(lambda _m, _a, output, i=number: self._keep(i, output))
            if number == last:
                block.register_forward_hook(lambda _m, _a, output: self._end(output))

    def _measure(self) -> None:
        streams = [carrier.streams for carrier in next(iter(self._region.blocks.values())).cut.values()]
        self._lengths[self._rows] = {name: self._tokens.parts[name].length for name in streams}

    def _keep(self, number: int, output: Output) -> None:
        self._outputs[number] = output

    def _end(self, output: Output) -> None:
        if not self.is_last:
            raise Left
        if not self._tokens.spans:
            self._head.see(self._rows, output, self._tokens.parts)

    def _take_out(self) -> None:
        own, end = self.cuts.runs[self._index], 0
        for blocks, passing in zip(self._lists, self._passing, strict=True):
            start, end = end, end + len(blocks)
            if end < own.start or start >= own.stop:
                del blocks[:]
                if end < own.start:
                    blocks.append(passing)
                continue
            # For a forward that counts its blocks, each of those before is there.
            for number in range(start, min(end, own.start)):
                blocks[number - start] = Elsewhere(lambda number=number: self._arrived(number))
            del blocks[own.stop - start :]

    def _arrived(self, number: int) -> Output:
        """Outputs that are not read are as good as any."""
        return self._outputs.get(number, self._outputs[self._arriving[-1]])
