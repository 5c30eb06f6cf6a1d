"""PipeFusion: patches of the picture travel through stages of the transformer, within and across steps.

Source: PipeFusion, arXiv:2405.14430, and xDiT's pipelines; docs/decisions/007-pipefusion.md says where
this departs from them.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from typing import Any

import torch

from comfy_xdit.protocol.errors import InvalidInput, counted
from comfy_xdit.protocol.messages import Sample
from worker.loop import Run
from worker.parallel import Announcement, Patches, RankGroups, Shard
from worker.sampling.guidance import Guidance
from worker.sampling.patch_sampler import PatchSampler
from worker.sampling.samplers import schedule
from worker.transformer import OPTIONS, Batch, StagedTransformer

Conditions = dict[str, Any]


@dataclass(frozen=True)
class RowGroup:
    """Rows of one batch that this rank's branch computes in one call: their prompts are of one length."""

    batch: int
    rows: list[int]
    given: Batch


class PipeFusion:
    """One sampling run over the stages. Every rank runs it alike; what it does depends on its stage.

    A call is of one patch, or of all (None).

    Args:
        batches: conditions, each one batch of rows: both sides of guidance together, or one after the
            other where they do not fit together.

    Raises:
        InvalidInput: a picture too small for the patches, or reference latents.
    """

    def __init__(
        self,
        request: Sample,
        transformer: StagedTransformer,
        groups: RankGroups,
        run: Run,
        batches: list[Conditions],
    ):
        self._request, self._transformer, self._groups, self._run = request, transformer, groups, run
        self._pipeline, self._stage = groups.pipeline, transformer.stage
        self._schedule = schedule(request.sampler, request.sigmas)
        self._warm = sum(step < request.warmup_steps for step, _ in self._schedule)
        copies = (1 if request.negative is None else 2) // len(batches)
        rows = torch.cat([request.latent] * copies)
        self._batches = [Batch(rows, rows.new_zeros(len(rows)), given) for given in batches]
        tokens = _checked_tokens(self._batches, transformer, groups, request.sigmas)
        # A run that is all warm-up is never cut.
        count = groups.degrees.stages if self._warm < len(self._schedule) else 1
        self._patches = Patches.of(transformer.stage.patched, tokens, count)
        self._all = range(count)
        self._row_groups = [g for i in range(len(batches)) for g in self._groups_of(i)]
        self._idle = transformer.idle_calls(self._batches)
        self._announced: deque[Announcement] = deque()
        guidance, sigma = Guidance.of(request), request.sigmas[0]
        # What the first stage computes on; written to by elements, so it lies in one piece.
        self._x = guidance.inputs(guidance.start(sigma), sigma).clone(memory_format=torch.contiguous_format)
        self._preview = torch.zeros_like(self._x)
        self._places: list[torch.Tensor] = []  # by patch, its elements in a row of x
        self._sampler: PatchSampler | None = None  # in the last stage

    # ------------------------------------------------------------------ the loop

    def sample(self) -> torch.Tensor | None:
        """The last latent, scaled, in the first stages; None in others.

        Raises:
            Interrupted: at a step boundary, on all ranks at the same step.
        """
        with self._stage.run(self._pipeline):
            for number, (step, _) in enumerate(self._schedule):
                if number and step > self._schedule[number - 1][0] and self._is_stopped():
                    if self._pipeline.is_first:
                        self._arrivals(number)
                    self._settle()
                    self._run.stop(step)
                for patch in self._calls(number):
                    self._call(number, patch)
                self._pipeline.next_evaluation()
            if self._pipeline.is_first:
                self._arrivals(len(self._schedule))
            self._settle()
        return self._x if self._pipeline.is_first else None

    def _calls(self, number: int) -> list[int | None]:
        """The calls of an evaluation: all patches at once in the warm-up, one by one after it."""
        return [None] if number < self._warm else list(self._all)

    def _call(self, number: int, patch: int | None) -> None:
        """One evaluation of one patch, or of all, in this stage."""
        if self._pipeline.is_first and number:
            self._arrival(number, patch)
        outputs = [self._output(index, number, patch) for index in range(len(self._row_groups))]
        self._transformer.gather_unused(self._idle)
        if not self._pipeline.is_last:
            return
        if self._sampler is None:
            self._find_places(outputs)
            self._sampler = PatchSampler(self._request, self._places)
        for one in self._of(patch):
            self._sampler.advance(one, self._gathered(outputs, self._places[one]))
        self._send_back(number + 1, patch)

    def _output(self, index: int, number: int, patch: int | None) -> torch.Tensor | None:
        """What a group of rows gives, shaped like their latents, in the last stage."""
        keep = number == self._warm - 1 < len(self._schedule) - 1

        def forward() -> torch.Tensor:
            return self._predicted(index, number)

        if patch is None:
            return self._stage.whole(forward, index, self._patches if keep else None)
        return self._stage.patch(forward, index, self._patches, patch)

    def _predicted(self, index: int, number: int) -> torch.Tensor:
        group = self._row_groups[index]
        x = self._x[[row % len(self._x) for row in group.rows]]
        level = self._schedule[number][1]
        timestep = self._request.timesteps[level].expand(len(x))
        given = _at_sigma(group.given.conditions, self._request.sigmas[level], self._request.sigmas)
        return self._transformer.predict_plain(replace(group.given, x=x, timestep=timestep, conditions=given))

    def _of(self, patch: int | None) -> range:
        return self._all if patch is None else range(patch, patch + 1)

    # ------------------------------------------------------------------ between stages

    def _find_places(self, outputs: list[torch.Tensor]) -> None:
        """In the last stage: the elements of every patch, which the first stage must know too."""
        size, branches = self._x[0].numel(), self._groups.degrees.branches
        owners = torch.zeros(size, dtype=torch.long, device=self._x.device)
        if len(self._all) > 1:
            # Where the model gives NaN anyway, which the end of the run tells, any places will do.
            if self._groups.branch == 0 and all(bool(output.isfinite().all()) for output in outputs):
                owners = self._stage.owners(lambda: self._predicted(0, 0), self._patches)
            if branches > 1:  # a branch without rows has nothing to find them with
                own = owners[None] if self._groups.branch == 0 else owners[None][:0]
                owners = self._groups.gather_rows(own, Shard(1, branches))[0]
            self._pipeline.send_back(owners)
        self._place(owners)

    def _told_places(self) -> None:
        """In the first stage."""
        owners = torch.zeros(self._x[0].numel(), dtype=torch.long, device=self._x.device)
        self._place(self._pipeline.receive_back(owners.shape, owners.dtype) if len(self._all) > 1 else owners)

    def _place(self, owners: torch.Tensor) -> None:
        self._places = [(owners == patch).nonzero().flatten() for patch in self._all]

    def _send_back(self, number: int, patch: int | None) -> None:
        """From the last stage: inputs of the next evaluation, or results, and what a preview shows."""
        now = self._sampler.result if number == len(self._schedule) else self._sampler.inputs
        for call in self._calls(number) if patch is None else [patch]:
            sent = [now(one) for one in self._of(call)]
            if self._request.previews:
                sent += [self._sampler.denoised(one) for one in self._of(call)]
            self._pipeline.send_back(torch.cat(sent, 1))

    def _arrival(self, number: int, patch: int | None) -> None:
        """In the first stage: what the last one has sent. The last patch of a step ends the step."""
        if not self._places:
            self._told_places()
        places = torch.cat([self._places[one] for one in self._of(patch)])
        width = len(places) * (2 if self._request.previews else 1)
        arrived = self._pipeline.receive_back((len(self._x), width), self._x.dtype)
        inputs, *shown = arrived.split(len(places), 1)
        self._x.flatten(1)[:, places] = inputs
        if shown:
            self._preview.flatten(1)[:, places] = shown[0]
        steps, done = self._schedule[-1][0] + 1, self._schedule[number - 1][0] + 1
        ends = number == len(self._schedule) or self._schedule[number][0] == done
        if ends and self._of(patch).stop == len(self._all):
            preview = self._preview.clone() if shown and self._groups.rank == 0 else None
            self._run.report(done, steps, preview)

    def _arrivals(self, number: int) -> None:
        """All patches of `_arrival`."""
        for patch in self._calls(number):
            self._arrival(number, patch)

    # ------------------------------------------------------------------ rows

    def _groups_of(self, number: int) -> list[RowGroup]:
        """What this rank's branch computes of one batch."""
        batch, shard = self._batches[number], self._groups.rows(len(self._batches[number]))
        span = slice(0, len(batch)) if shard is None else shard.span(self._groups.branch)
        own = batch.rows(span)
        if len(own) == 0:
            return []
        groups = own.by_length()
        return [RowGroup(number, [span.start + row for row in rows], given) for rows, given in groups]

    def _gathered(self, outputs: list[torch.Tensor], places: torch.Tensor) -> torch.Tensor:
        """Some elements of the outputs of all rows, of which this branch has those of its groups."""
        batches = []
        for number, batch in enumerate(self._batches):
            mine = [(g, o) for g, o in zip(self._row_groups, outputs, strict=True) if g.batch == number]
            rows = torch.tensor([row for group, _ in mine for row in group.rows], dtype=torch.long)
            own = torch.cat([self._x.new_zeros(0, len(places)), *(o.flatten(1)[:, places] for _, o in mine)])
            own = own[rows.argsort().to(own.device)]
            shard = self._groups.rows(len(batch))
            batches.append(own if shard is None else self._groups.gather_rows(own, shard))
        return torch.cat(batches)

    # ------------------------------------------------------------------ the end

    def _is_stopped(self) -> bool:
        """Whether the host asked to stop before this step. Rank 0 does not wait for those behind it."""
        asked = self._run.asked()
        announced = self._groups.announce(asked)
        self._announced.append(announced)
        if len(self._announced) > 3:  # every rank has asked for the flag of that step
            self._announced.popleft().wait()
        return asked if self._groups.rank == 0 else announced.wait()

    def _settle(self) -> None:
        """Until everything sent has been received."""
        self._pipeline.settle()
        for announced in self._announced:
            announced.wait()


def _checked_tokens(
    batches: list[Batch], transformer: StagedTransformer, groups: RankGroups, sigmas: torch.Tensor
) -> int:
    """How many tokens the picture has."""
    degrees = groups.degrees
    if any(batch.conditions.get("ref_latents") for batch in batches):
        raise InvalidInput(
            "reference latents under PipeFusion are not in this version; set pipefusion_degree to 1 and "
            "ulysses_degree instead."
        )
    _, first = next(batches[0].rows([0]).by_length())
    given = _at_sigma(first.conditions, sigmas[0], sigmas)
    tokens = transformer.image_tokens(replace(first, conditions=given))
    if tokens < degrees.stages:
        raise InvalidInput(
            f"the picture has {counted(tokens, 'token')}, and pipefusion_degree {degrees.stages} needs one "
            "for each stage; draw a larger picture, or set pipefusion_degree to 1."
        )
    return tokens


def _at_sigma(conditions: Conditions, sigma: torch.Tensor, sigmas: torch.Tensor) -> Conditions:
    """With what samplers tell ComfyUI's own classes beside the timestep."""
    if OPTIONS not in conditions:
        return conditions
    return conditions | {OPTIONS: conditions[OPTIONS] | {"sigmas": sigma[None], "sample_sigmas": sigmas}}
