"""One of four ranks that run every case over stages, and compare with one process.

Usage: python -m tests.pipefusion_plan_ranks RANK FILE, a file that all ranks meet at. Rank 0 prints JSON: by
case and layout, by run, [relative L2 from what it should be, from a run without patches].
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from tests.plan_cases import CASES, Case, run
from tests.stale_keys import StaleKeys, euler, token_of_element
from worker.models.plans.diffusers import PLANS
from worker.parallel.attention.kept_keys import Patches
from worker.parallel.mesh import Mesh
from worker.parallel.pipefusion.stage import Stage
from worker.parallel.pipeline import Pipeline

WORLD, STEPS, CFG = 4, 4, 2.5
SIGMAS = torch.tensor([1.0, 0.8, 0.55, 0.25, 0.0])
EVEN, ODD = (5, 4, 4), (5, 3, 5)
# Those that PipeFusion is held to, with blocks enough for four stages.
_TWO_KINDS, _PACKED = {"num_layers": 2}, {"num_layers": 2, "out_channels": 16}
CHANGES = {
    "HunyuanDiT": {"num_layers": 6}, "FLUX.1": _PACKED, "Flux.2": _PACKED, "HunyuanVideo": _TWO_KINDS,
    "HunyuanVideo I2V": _TWO_KINDS,
}  # fmt: skip
NAMES = (
    "SD3.5 medium", "SD3.5 medium, 3 heads", "FLUX.1", "PixArt", "HunyuanDiT", "Wan 2.1 T2V", "Wan 2.1 I2V",
    "CogVideoX", "Qwen-Image", "HunyuanVideo", "HunyuanVideo I2V", "HunyuanVideo 1.5", "Flux.2",
)  # fmt: skip
STAGED = {
    name: replace(CASES[name], config=CASES[name].config | {"num_layers": 4} | CHANGES.get(name, {}))
    for name in NAMES
}


@dataclass(frozen=True)
class Run:
    """A picture in patches.

    Args:
        parts: how large patches are, in proportion.
        warm: steps of warm-up.
        apart: both prompts of guidance as calls of their own, of different length.
    """

    grid: tuple[int, int, int]
    parts: tuple[int, ...]
    warm: int = 1
    apart: bool = False

    def ends(self, tokens: int) -> list[int]:
        """The token behind each patch; each has one at least."""
        total, ends = sum(self.parts), []
        for i in range(len(self.parts)):
            end = round(tokens * sum(self.parts[: i + 1]) / total)
            ends.append(max(end, ends[-1] + 1 if ends else 1))
        return ends


RUNS = {
    "warm-up": Run(EVEN, (1, 1), STEPS),
    "2 patches": Run(EVEN, (1, 1)),
    "4 patches": Run(ODD, (1, 1, 1, 1)),
    "uneven patches": Run(ODD, (7, 3, 3, 1)),
    "prompts apart": Run(ODD, (2, 1), apart=True),
}


class Guided:
    """A case's model under guidance; x has one row, a call has both prompts' rows or one of them."""

    def __init__(self, case: Case, asked: Run, model: torch.nn.Module):
        self.model, self.case = model, case
        both = case.inputs(2, asked.grid, 8)
        self.x = both["hidden_states"][:1].contiguous()
        short = case.inputs(1, asked.grid, 5 if case.short else 8)
        self.rows = [case.inputs(1, asked.grid, 8), short] if asked.apart else [both]
        self.tokens = token_of_element(case.kind, self.x.shape)
        self.count = int(self.tokens.max()) + 1

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, group: int) -> torch.Tensor:
        given = self.rows[group]
        rows = len(given["timestep"])
        hidden = x.expand(rows, *x.shape[1:])
        out = run(self.model, given | {"hidden_states": hidden, "timestep": given["timestep"] * sigma})[0]
        return out if out.shape == hidden.shape else out.narrow(1, 0, x.shape[1])  # variance is behind it

    @staticmethod
    def combined(outputs: list[torch.Tensor]) -> torch.Tensor:
        """The guided output, one row."""
        one, other = outputs if len(outputs) == 2 else outputs[0].chunk(2)
        return other + CFG * (one - other)


def expected(case: Case, asked: Run) -> torch.Tensor:
    """The run in one process; a whole warm-up is plain diffusers."""
    guided = Guided(case, asked, case.build())
    x, groups = guided.x, len(guided.rows)
    if asked.warm == STEPS:
        for step in range(STEPS):
            outputs = [guided(x, SIGMAS[step], group) for group in range(groups)]
            x = x + (SIGMAS[step + 1] - SIGMAS[step]) * Guided.combined(outputs)
        return x
    stale, ends = StaleKeys(guided.model, guided.count), asked.ends(guided.count)
    return euler(guided, stale, groups, x, guided.tokens, SIGMAS, ends, asked.warm, Guided.combined)


class Staged:
    """A run over stages, which all of them step alike; the last one has the result."""

    def __init__(self, guided: Guided, stage: Stage, pipeline: Pipeline, asked: Run):
        self.guided, self.stage, self.pipeline, self.asked = guided, stage, pipeline, asked
        ends = asked.ends(guided.count)
        self.patches = Patches("image", tuple(zip([0, *ends[:-1]], ends, strict=True)))
        self.x = guided.x.clone()
        self.flat = self.x.view(-1)
        self.places: list[torch.Tensor] = []  # the elements of each patch

    def run(self) -> torch.Tensor:
        """The last x."""
        for step in range(STEPS):
            for number in self._calls(step):
                if step and self.stage.is_first:
                    own = self._own(number, self._received)
                    self.flat[own] = self.pipeline.receive_back((len(own),), self.x.dtype)
                outputs = [self._call(step, number, group) for group in range(len(self.guided.rows))]
                if self.stage.is_last:
                    self._advance(step, number, Guided.combined(outputs).reshape(-1))
            self.pipeline.next_evaluation()
        self.pipeline.settle()
        return self.x

    def _calls(self, step: int) -> list[int | None]:
        return [None] if step < self.asked.warm else list(range(len(self.patches.spans)))

    def _call(self, step: int, number: int | None, group: int) -> Any:
        def forward() -> torch.Tensor:
            return self.guided(self.x, SIGMAS[step], group)

        if number is not None:
            return self.stage.patch(forward, group, self.patches, number)
        return self.stage.whole(forward, group, self.patches if step == self.asked.warm - 1 else None)

    def _advance(self, step: int, number: int | None, output: torch.Tensor) -> None:
        own = self._own(number, self._found)
        self.flat[own] += (SIGMAS[step + 1] - SIGMAS[step]) * output[own]
        if step + 1 < STEPS:
            later = self._calls(step + 1) if number is None else [number]
            for part in later:
                self.pipeline.send_back(self.flat[self._own(part, self._found)])

    def _own(self, number: int | None, owners: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Which elements come with a call."""
        if not self.places:
            found = owners()
            self.places = [(found == patch).nonzero().flatten() for patch in range(len(self.patches.spans))]
        return torch.arange(self.x.numel()) if number is None else self.places[number]

    def _found(self) -> torch.Tensor:
        owners = self.stage.owners(lambda: self.guided(self.x, SIGMAS[0], 0), self.patches)
        ends = torch.tensor([stop for _, stop in self.patches.spans])
        known = torch.bucketize(self.guided.tokens, ends, right=True)
        assert torch.equal(owners, known), "the elements of a patch are not those of its tokens"
        self.pipeline.send_back(owners)
        return owners

    def _received(self) -> torch.Tensor:
        return self.pipeline.receive_back((self.x.numel(),), torch.long)


def layouts(rank: int) -> dict[str, tuple[Pipeline, Mesh]]:
    """Of each layout this rank's pipeline, and the mesh inside its stage. Two pairs work apart."""
    ranks = {"2 stages": [[0, 1], [2, 3]], "4 stages": [[0, 1, 2, 3]], "crossed": [[0, 2], [1, 3]]}
    device, timeout = torch.device("cpu"), timedelta(minutes=5)
    pipelines = {name: Pipeline(found, rank, device, timeout) for name, found in ranks.items()}
    pair = [dist.new_group([first, first + 1]) for first in (0, 2)][rank // 2]
    return {
        "2 stages": (pipelines["2 stages"], Mesh()),
        "4 stages": (pipelines["4 stages"], Mesh()),
        "2 stages x Ulysses 2": (pipelines["crossed"], Mesh(2, 1, rank % 2, pair, None, pair)),
        "2 stages x Ring 2": (pipelines["crossed"], Mesh(1, 2, rank % 2, None, pair, pair)),
    }


def error(got: torch.Tensor, wanted: torch.Tensor, begun: torch.Tensor) -> float:
    """Relative L2 of what a run did to its noise."""
    assert bool(wanted.isfinite().all()) and float((wanted - begun).norm()) > 0
    return float((got - wanted).norm() / (wanted - begun).norm())


class Measured:
    """What one rank finds; runs in one process are computed once."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, list[float]]] = {}
        self._known: dict[tuple[str, Run], torch.Tensor] = {}

    def case(self, name: str, layout: str, pipeline: Pipeline, mesh: Mesh) -> None:
        """All runs of a case in one layout."""
        case = STAGED[name]
        model, errors = case.build(), {}
        stage = Stage(model, PLANS[case.family], name, pipeline.stage, pipeline.stages, mesh)
        for title, asked in RUNS.items():
            guided = Guided(case, asked, model)
            with stage.run(pipeline):
                got = Staged(guided, stage, pipeline, asked).run()
            if stage.is_last:
                wanted = [self._expected(name, kind) for kind in (asked, replace(asked, warm=STEPS))]
                errors[title] = [error(got, one, guided.x) for one in wanted]
        self.found[f"{name}, {layout}"] = errors

    def _expected(self, name: str, asked: Run) -> torch.Tensor:
        if (name, asked) not in self._known:
            self._known[name, asked] = expected(STAGED[name], asked)
        return self._known[name, asked]


def main(rank: int, file: str, names: tuple[str, ...]) -> None:
    """Measure all cases; each pair has every second one of the layout of two ranks."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=WORLD)
    measured = Measured()
    with torch.inference_mode():
        for layout, (pipeline, mesh) in layouts(rank).items():
            for number, name in enumerate(names):
                if layout != "2 stages" or number % 2 == rank // 2:
                    measured.case(name, layout, pipeline, mesh)
    every: list[Any] = [None] * WORLD
    dist.all_gather_object(every, measured.found)
    if rank == 0:
        print(json.dumps({name: errors for one in every for name, errors in one.items() if errors}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], tuple(sys.argv[3:]) or NAMES)
