"""PipeFusion: patches of the picture travel through stages of the transformer, within and across steps.

Source: PipeFusion, arXiv:2405.14430, and xDiT's pipelines; docs/decisions/007-pipefusion.md says where
this departs from them.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch

from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.messages import Sample
from worker.loop import Run
from worker.models.base import PATCH, to_whole_patches
from worker.parallel.groups import Announcement, RankGroups
from worker.parallel.key_value_cache import KeyValueCache, PatchTokens, brings_text, spans
from worker.parallel.plan import Plan
from worker.sampling.patch_sampler import PatchSampler, picture
from worker.sampling.samplers import schedule
from worker.transformer.batch import Batch
from worker.transformer.transformer import Transformer

Conditions = dict[str, Any]


@dataclass
class RowGroup:
    """Rows of one batch that this rank's branch computes in one call: their prompts are of one length.

    `memory` holds what is computed once: embeddings of time per evaluation, rotary tables per patch.
    """

    batch: int
    rows: list[int]
    kwargs: dict[str, Any]
    tokens: PatchTokens
    memory: dict[Any, Any] = field(default_factory=dict)


class PipeFusion:
    """One sampling run over the stages. Every rank runs it alike; what it does depends on its stage.

    Args:
        batches: conditions, each one batch of rows: both sides of guidance together, or one after the
            other where they do not fit together.

    Raises:
        InvalidInput: a picture too small for the patches, or reference latents.
    """

    def __init__(
        self,
        request: Sample,
        transformer: Transformer,
        groups: RankGroups,
        run: Run,
        batches: list[Conditions],
    ):
        self._request, self._transformer, self._groups, self._run = request, transformer, groups, run
        self._pipeline, self._parts = groups.pipeline, transformer.family.parts
        self._module, self._stage = transformer.module, transformer.stage
        whole = to_whole_patches(request.latent)
        self._grid = (whole.shape[-2] // PATCH, whole.shape[-1] // PATCH)
        tokens = self._grid[0] * self._grid[1]
        _check(tokens, groups, batches)
        self._patches = spans(tokens, groups.degrees.stages)
        self._all = range(len(self._patches))
        self._channels = whole.shape[1] * PATCH**2
        self._schedule = schedule(request.sampler, request.sigmas)
        self._warm = sum(step < request.warmup_steps for step, _ in self._schedule)
        self._sampler = PatchSampler(request, self._patches)
        copies = (1 if request.negative is None else 2) // len(batches)
        self._batches = [Batch(whole.repeat(copies, 1, 1, 1), whole.new_zeros(0), given) for given in batches]
        self._row_groups = [g for i in range(len(batches)) for g in self._groups_of(i)]
        self._idle = transformer.idle_calls(self._batches)
        self._preview = whole.new_zeros(whole.shape[0], tokens, self._channels)
        self._announced: deque[Announcement] = deque()

    # ------------------------------------------------------------------ the loop

    def sample(self) -> torch.Tensor | None:
        """The last latent (B, C, H, W), scaled, in the first stages; None in others.

        Raises:
            Interrupted: at a step boundary, on all ranks at the same step.
        """
        cache = KeyValueCache(self._module)
        blocks = [self._module.get_submodule(name) for name in self._stage.names]
        try:
            for number, (step, _) in enumerate(self._schedule):
                if number and step > self._schedule[number - 1][0] and self._is_stopped():
                    if self._pipeline.is_first:
                        self._arrivals(number)
                    self._settle()
                    self._run.stop(step)
                for which in self._calls(number):
                    self._call(number, which, blocks, cache)
                self._pipeline.next_evaluation()
            result = None
            if self._pipeline.is_first:
                x = self._arrivals(len(self._schedule))
                result = picture(x, self._request.latent.shape)
            self._settle()
            return result
        finally:
            cache.close()

    def _calls(self, number: int) -> list[range]:
        """The patches of every call of an evaluation: all at once in the warm-up, one by one after it."""
        return [self._all] if number < self._warm else [range(p, p + 1) for p in self._all]

    def _call(self, number: int, which: range, blocks: list[torch.nn.Module], cache: KeyValueCache) -> None:
        """One evaluation of some patches, in this stage."""
        x = None
        if self._pipeline.is_first:
            x = self._arrival(number, which) if number else self._sampler.inputs(which)
        keep, outputs = number == self._warm - 1 < len(self._schedule) - 1, []
        for index, group in enumerate(self._row_groups):
            time = self._time(group, number)
            image, text = self._entering(group, which, x)
            rotary = self._rotary(group, which)
            with cache.call(index, group.tokens, which, keep):
                for block in blocks:
                    text, image = block(hidden_states=image, encoder_hidden_states=text, temb=time, **rotary)
            if self._pipeline.is_last:
                output = self._parts.output(self._module, image, time)
                outputs.append(group.tokens.whole_image(output, which))
            else:
                self._pipeline.send(torch.cat([image, text], 1))
        self._transformer.gather_unused(self._idle)
        if self._pipeline.is_last:
            self._sampler.advance(which, self._gathered(outputs, which))
            self._send_back(number + 1, which)

    # ------------------------------------------------------------------ between stages

    def _entering(
        self, group: RowGroup, which: range, x: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Image and text tokens of this rank before its first block."""
        config, rows, dtype = self._transformer.config, len(group.rows), self._transformer.dtype
        width = config["num_attention_heads"] * config["attention_head_dim"]
        if x is None:
            sizes = group.tokens.sizes(which)
            image, text = self._pipeline.receive((rows, sum(sizes), width), dtype).split(sizes, 1)
            return image.contiguous(), text.contiguous()
        own = x[[row % x.shape[0] for row in group.rows]].to(dtype)
        image = self._parts.image(self._module, own, self._patches[which.start][0], self._grid)
        image = group.tokens.own_image(image, which)
        if not brings_text(which):
            return image, image.new_zeros(rows, 0, width)
        if "text" not in group.memory:
            text = self._module.context_embedder(group.kwargs["encoder_hidden_states"])
            group.memory["text"] = group.tokens.own_text(text)
        return image, group.memory["text"]

    def _send_back(self, number: int, which: range) -> None:
        """From the last stage: inputs of the next evaluation, or results, and what a preview shows."""
        ended = number == len(self._schedule)
        for call in self._calls(number) if which == self._all else [which]:
            tokens = self._sampler.results(call) if ended else self._sampler.inputs(call)
            if self._request.previews:
                tokens = torch.cat([tokens, self._sampler.denoised(call)], 2)
            self._pipeline.send_back(tokens)

    def _arrival(self, number: int, which: range) -> torch.Tensor:
        """In the first stage: what the last one has sent. The last patch of a step ends the step."""
        start, stop = self._patches[which.start][0], self._patches[which.stop - 1][1]
        width = self._channels * (2 if self._request.previews else 1)
        shape = (self._request.latent.shape[0], stop - start, width)
        tokens, *shown = self._pipeline.receive_back(shape, self._request.latent.dtype).split(
            self._channels, 2
        )
        if shown:
            self._preview[:, start:stop] = shown[0]
        steps, done = self._schedule[-1][0] + 1, self._schedule[number - 1][0] + 1
        ends = number == len(self._schedule) or self._schedule[number][0] == done
        if ends and which.stop == len(self._patches):
            preview = picture(self._preview, self._request.latent.shape).clone() if shown else None
            self._run.report(done, steps, preview if self._groups.rank == 0 else None)
        return tokens

    def _arrivals(self, number: int) -> torch.Tensor:
        """All patches of `_arrival`."""
        return torch.cat([self._arrival(number, which) for which in self._calls(number)], 1)

    # ------------------------------------------------------------------ rows

    def _groups_of(self, number: int) -> list[RowGroup]:
        """What this rank's branch computes of one batch."""
        batch, shard = self._batches[number], self._groups.rows(len(self._batches[number]))
        span = slice(0, len(batch)) if shard is None else shard.span(self._groups.branch)
        own, family, found = batch.rows(span), self._transformer.family, []
        if len(own) == 0:
            return []
        for rows, group in own.by_length():
            x = group.x.to(self._transformer.dtype)
            call = family.call(self._transformer.config, x, x.new_zeros(len(rows)), group.conditions)
            tokens = PatchTokens(self._groups, _text_first(family.plan), self._patches, call.text_tokens)
            found.append(RowGroup(number, [span.start + row for row in rows], call.kwargs, tokens))
        return found

    def _gathered(self, outputs: list[torch.Tensor], which: range) -> torch.Tensor:
        """The outputs of all rows of all batches, of which this branch has those of its groups."""
        tokens = self._patches[which.stop - 1][1] - self._patches[which.start][0]
        batches = []
        for number, batch in enumerate(self._batches):
            mine = [(g, o) for g, o in zip(self._row_groups, outputs, strict=True) if g.batch == number]
            rows = torch.tensor([row for group, _ in mine for row in group.rows], dtype=torch.long)
            own = torch.cat([batch.x.new_zeros(0, tokens, self._channels), *(o.to(batch.x) for _, o in mine)])
            own = own[rows.argsort().to(own.device)]
            shard = self._groups.rows(len(batch))
            batches.append(own if shard is None else self._groups.gather_rows(own, shard))
        return torch.cat(batches)

    def _time(self, group: RowGroup, number: int) -> torch.Tensor:
        if group.memory.get("evaluation") != number:
            timestep = (self._schedule[number][1] * self._request.multiplier).expand(len(group.rows))
            kwargs = {**group.kwargs, "timestep": timestep}
            group.memory |= {"evaluation": number, "time": self._parts.time(self._module, kwargs)}
        return group.memory["time"]

    def _rotary(self, group: RowGroup, which: range) -> dict[str, Any]:
        """Rotary tables of this rank's tokens, as the blocks' keyword argument."""
        if which not in group.memory:
            text, (start, stop) = group.tokens.text.length, (which.start, which.stop - 1)
            image = slice(text + self._patches[start][0], text + self._patches[stop][1])
            tables = []
            for table in self._parts.rotary(self._module, group.kwargs):
                own = [group.tokens.own_text(table[:text], 0)] if brings_text(which) else []
                tables.append(torch.cat([*own, group.tokens.own_image(table[image], which, 0)]))
            group.memory[which] = {"image_rotary_emb": tuple(tables)} if tables else {}
        return group.memory[which]

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


def _text_first(plan: Plan) -> bool:
    joint = max((a.query.split() for a in plan.regions[0].attention.values()), key=len)
    return joint[0] == "text"


def _check(tokens: int, groups: RankGroups, batches: list[Conditions]) -> None:
    degrees = groups.degrees
    needed = degrees.stages * (degrees.sequence if degrees.ring > 1 else 1)
    if tokens < needed:
        raise InvalidInput(
            f"{tokens} image tokens are fewer than the {needed} that {degrees.stages} patches over "
            f"{degrees.sequence} ranks need; draw a larger picture, or set pipefusion_degree to 1."
        )
    if any(given.get("ref_latents") for given in batches):
        raise InvalidInput(
            "reference latents under PipeFusion are not in this version; set pipefusion_degree to 1 and "
            "ulysses_degree instead."
        )
