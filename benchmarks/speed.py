"""Two ranks against one, one thread each, side by side in one run: part of `make bench`.

Every way draws the same latent from the same tiny FLUX.1 with an Euler loop. A way and what it is compared
with take turns, so that a busy machine is busy for both, and no others are there meanwhile: a dozen idle
ranks cost two cores several percent. Ratios are medians over the turns. Beside our own layouts: one process
with two threads (plain diffusers), xfuser's own wrapper in a bare program under torchrun, and two processes
that draw a picture each and share nothing: what the two cores can do at most. What is compared with bare
xfuser, to a few percent, runs in every turn; the rest in every fourth.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from comfy_xdit.bench.chart import bars
from comfy_xdit.protocol.messages import Sample
from comfy_xdit.protocol.parallel import ParallelConfig
from comfy_xdit.protocol.spec import ModelSpec
from comfy_xdit.ranks.environment import ROOT
from comfy_xdit.ranks.registry import running_groups
from comfy_xdit.remote.model import RemoteModel
from tests import tiny
from worker.models.flux.family import Flux

CONFIG = {
    **tiny.FLUX_CONFIG, "num_layers": 2, "num_single_layers": 4, "attention_head_dim": 64,
    "axes_dims_rope": (8, 28, 28),
}  # fmt: skip
TEXT = 64
SIDES = {1024: 64, 4096: 128}  # image tokens: latent pixels of a side
STEPS = {1024: 8, 4096: 2}
PIPEFUSION_STEPS = 10  # its first step is not parallel: fewer would say little about the others
CFG = 3.0
SECONDS = 300.0  # for one loop of a bare program, or its end
OVER_BARE = 1.03  # at most: a whole loop of ours by one of bare xfuser
SAME = 1e-5  # relative L2 of (latent - noise) between all ways that are exact
XFUSER = "bare xfuser, "
SELDOM = 4  # of so many turns, one has those ways too that are not compared with bare xfuser
WIDTH = CONFIG["num_attention_heads"] * CONFIG["attention_head_dim"]
BLOCKS = CONFIG["num_layers"] + CONFIG["num_single_layers"]
Loop = Callable[[], float]  # runs a loop; returns seconds
Times = dict[str, dict[int, float]]  # seconds by way and turn
Row = dict[str, Any]


@dataclass(frozen=True)
class Way:
    """One way to draw, and the way it is compared with."""

    name: str
    against: str
    layout: ParallelConfig
    batch: int = 1
    guided: bool = False
    steps: int | None = None


ONE = ParallelConfig()
WAYS = (
    Way("one rank", "", ONE),
    Way("Ulysses 2", "one rank", ParallelConfig(ulysses_degree=2)),
    Way("Ring 2", "one rank", ParallelConfig(ring_degree=2)),
    Way("one rank, guided", "", ONE, guided=True),
    Way("CFG 2", "one rank, guided", ParallelConfig(cfg_parallel_degree=2), guided=True),
    Way("one rank, two pictures", "", ONE, batch=2),
    Way("data 2", "one rank, two pictures", ParallelConfig(data_parallel_degree=2), batch=2),
    Way("one rank, 10 steps", "", ONE, steps=PIPEFUSION_STEPS),
    Way("PipeFusion 2", "one rank, 10 steps", ParallelConfig(pipefusion_degree=2), steps=PIPEFUSION_STEPS),
)  # fmt: skip
Bare = tuple[str, str, int, int, str, int]
# name, method, processes, threads of each, the way it is compared with, pictures
BARE: tuple[Bare, ...] = (
    ("one process, two threads", "one", 1, 2, "one rank", 1),
    (f"{XFUSER}Ulysses 2", "ulysses", 2, 1, "one rank", 1),
    (f"{XFUSER}Ring 2", "ring", 2, 1, "one rank", 1),
    ("two processes apart", "apart", 2, 1, "one rank", 2),
)
TOGETHER = (
    ("one rank", "Ulysses 2", f"{XFUSER}Ulysses 2"),
    ("one rank", "Ring 2", f"{XFUSER}Ring 2"),
    ("one rank", "one process, two threads", "two processes apart"),
    ("one rank, guided", "CFG 2"),
    ("one rank, two pictures", "data 2"),
    ("one rank, 10 steps", "PipeFusion 2"),
)


class Problem:
    """A model on disk and one request of so many image tokens, with the answers so far."""

    def __init__(self, folder: Path, tokens: int):
        self.folder, self.tokens, self.side = folder, tokens, SIDES[tokens]
        self.module = tiny.build(Flux(), CONFIG)
        self.module.save_pretrained(folder / "transformer")
        self.noise = torch.randn(2, 16, self.side, self.side, generator=torch.Generator().manual_seed(1))
        self.given = tiny.conditions(Flux(), CONFIG, TEXT, 2)
        self.latents: dict[str, torch.Tensor] = {}
        call = Flux().call(dict(self.module.config), self.noise[:1], torch.ones(1), self.rows(1))
        torch.save(call.kwargs, folder / "call.pt")

    def rows(self, batch: int) -> dict[str, torch.Tensor]:
        """The first prompts."""
        return {name: value[:batch] for name, value in self.given.items()}

    def ours(self, way: Way) -> Loop:
        """A loop in our ranks."""
        remote = RemoteModel(ModelSpec.of(self.folder / "transformer", "transformer"), way.layout)
        noise = self.noise[: way.batch]
        sigmas = torch.linspace(1.0, 0.0, (way.steps or STEPS[self.tokens]) + 1)
        request = Sample(
            remote.spec, "euler", sigmas,
            torch.zeros_like(noise), noise, CFG if way.guided else 1.0, self.rows(way.batch),
            {name: value[1:] for name, value in self.given.items()} if way.guided else None, sigmas,
        )  # fmt: skip

        def run() -> float:
            began = time.perf_counter()
            latent = remote.sample(request, interrupted=lambda: False)
            seconds = time.perf_counter() - began
            self.latents[way.name] = latent - noise
            return seconds

        return run

    @contextmanager
    def bare(self, name: str, method: str, processes: int, threads: int) -> Iterator[Loop]:
        """A loop in a bare program."""
        pipe = self.folder / method
        pipe.mkdir()
        names = [f"go.{rank}" for rank in range(processes)]
        for file in (*names, "done"):
            os.mkfifo(pipe / file)
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command = [sys.executable, *(torchrun if processes > 1 else ()), "-m", "benchmarks.bare"]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "XDIT_LOGGING_LEVEL": "ERROR"}
        log = pipe / "log.txt"
        with log.open("w") as out:
            process = subprocess.Popen(
                [*command, method, str(self.folder)],
                cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT,
            )  # fmt: skip
        with ExitStack() as stack:
            stack.callback(process.wait, SECONDS)
            # Opened for both directions, so that no end waits for the other to be there.
            ends = [stack.enter_context((pipe / file).open("r+b", buffering=0)) for file in names]
            done = stack.enter_context((pipe / "done").open("r+b", buffering=0))

            def run() -> float:
                for end in ends:
                    end.write(b"%d\n" % STEPS[self.tokens])
                ready, _, _ = select.select([done], [], [], SECONDS)
                assert ready, f"{name} did not answer in {SECONDS:g} s:\n{log.read_text()}"
                seconds = float(done.readline())
                tokens = torch.load(pipe / "last.pt")
                self.latents[name] = Flux().output(CONFIG, tokens, self.noise[:1]) - self.noise[:1]
                return seconds

            yield run


def measure(tokens: int, rounds: int) -> list[Row]:
    """Rows of the table for one picture size; what others are compared with comes once for each of them."""
    rows = []
    for together in TOGETHER:
        ways = [way for way in WAYS if way.name in together]
        bare = [way for way in BARE if way[0] in together]
        times: Times = {}
        with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
            stack.callback(_end_ranks)
            problem = Problem(Path(folder), tokens)
            loops = {way.name: problem.ours(way) for way in ways}
            for name, method, processes, threads, *_ in bare:
                loops[name] = stack.enter_context(problem.bare(name, method, processes, threads))
            for run in loops.values():
                run()  # starts, loads, warms up
            _check(problem.latents, ways, bare)
            for turn in range(rounds):
                for name, run in loops.items():
                    if turn % _every(name, together) == 0:
                        times.setdefault(name, {})[turn] = run()
        rows += [*_rows(tokens, ways, times), *_bare_rows(tokens, bare, times)]
        print(*table(rows[-len(loops) :]), *over_bare(tokens, times), sep="\n", flush=True)
    return rows


def _every(name: str, together: tuple[str, ...]) -> int:
    """The turns between two of a way."""
    beside_xfuser = any(other.startswith(XFUSER) for other in together)
    return 1 if beside_xfuser and name != "one rank" else SELDOM


def over_bare(tokens: int, times: Times) -> Iterator[str]:
    """A line for each of our layouts that bare xfuser took turns with."""
    for name in times:
        if f"{XFUSER}{name}" in times:
            found = _speedup(times, f"{XFUSER}{name}", name)
            said = "held" if found <= OVER_BARE else "OVER THE LIMIT"
            yield (
                f"{tokens} tokens, {name}: a whole loop by one of bare xfuser {found:.3f}, median of "
                f"{len(times[name])} turns; limit {OVER_BARE:g}: {said}"
            )


def _end_ranks() -> None:
    for group in running_groups():
        group.close()


def _rows(tokens: int, ways: list[Way], times: Times) -> Iterator[Row]:
    """Our layouts, in the form benchmarks/plan_check.py reads: seconds are those of a step."""
    module = tiny.build(Flux(), CONFIG)
    shape = {
        "heads": CONFIG["num_attention_heads"], "width": WIDTH, "blocks": BLOCKS,
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
    }  # fmt: skip
    for way in ways:
        steps = way.steps or STEPS[tokens]
        yield {
            "family": "flux", "tokens": tokens, "name": way.name, "against": way.against,
            "layout": "1 rank" if way.layout == ONE else way.name,
            "cfg": way.guided, "batch": way.batch, "steps": steps, "shape": shape | {"cfg": way.guided},
            "seconds": statistics.median(times[way.name].values()) / steps,
            "speedup": _speedup(times, way.name, way.against),
        }  # fmt: skip


def _bare_rows(tokens: int, bare: list[Bare], times: Times) -> Iterator[Row]:
    """What stands beside them."""
    for name, *_, against, pictures in bare:
        yield {
            "family": "flux", "tokens": tokens, "name": name, "against": against, "layout": None,
            "seconds": statistics.median(times[name].values()) / STEPS[tokens],
            "speedup": pictures * _speedup(times, name, against),
        }  # fmt: skip


def _speedup(times: Times, name: str, against: str) -> float | None:
    """The median over the turns, each against its neighbour in time."""
    if not against:
        return None
    both = times[name].keys() & times[against].keys()
    return statistics.median(times[against][turn] / times[name][turn] for turn in both)


def _check(latents: dict[str, torch.Tensor], ways: list[Way], bare: list[Bare]) -> None:
    """Ways of one request agree; PipeFusion after its warm-up is near, which make parity measures."""
    pairs = [(way.name, way.against) for way in ways if way.against and way.layout.pipefusion_degree == 1]
    for name, other in pairs + [(name, other) for name, *_, other, _ in bare]:
        difference = tiny.relative_l2(latents[name], latents[other])
        assert difference <= SAME, f"{name} differs from {other} by {difference:.1e}"


def table(rows: list[Row]) -> Iterator[str]:
    """Lines of Markdown."""
    yield "| image tokens | way | seconds per step | against | speed-up |"
    yield "|---|---|---|---|---|"
    for row in rows:
        speedup = "" if row["speedup"] is None else f"{row['speedup']:.2f}"
        yield f"| {row['tokens']} | {row['name']} | {row['seconds']:.3f} | {row['against']} | {speedup} |"


def main() -> None:
    """Measure, print, write JSON and a picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--tokens", type=int, nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--output", type=Path, default=Path("output/speed"))
    arguments = parser.parse_args()
    os.environ["XDIT_OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    rows = [row for tokens in arguments.tokens for row in measure(tokens, arguments.rounds)]
    print(*table(rows), sep="\n")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.with_suffix(".json").write_text(
        json.dumps(
            {"rows": [r for r in rows if r["layout"]], "beside": [r for r in rows if not r["layout"]]},
            indent=1,
        )
    )
    measured = {f"{row['tokens']} tokens, {row['name']}": row["speedup"] for row in rows if row["speedup"]}
    bars("speed-up over one rank", measured, arguments.output.with_suffix(".png"), line=2.0)


if __name__ == "__main__":
    main()
