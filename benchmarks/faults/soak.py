"""`make soak RUNS=500`: many runs with cancels, kills, other layouts and other models; what grows is shown.

Every run draws from a tiny model, and every answer must equal, bit by bit, what the same layout drew at the
beginning. The host's and the ranks' memory, descriptors and threads are noted after every run.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["XDIT_OMP_NUM_THREADS"] = "1"

import psutil
import torch

from benchmarks.faults import page
from comfy_xdit.protocol.errors import Interrupted, WorkerDied
from comfy_xdit.protocol.messages import Progress, Sample
from comfy_xdit.protocol.parallel import ParallelConfig
from comfy_xdit.protocol.spec import ModelSpec
from comfy_xdit.ranks.registry import running_groups, worker_group
from comfy_xdit.remote.model import RemoteModel
from tests import tiny

LAYOUTS = {
    "Ulysses 2": ParallelConfig(ulysses_degree=2),
    "Ring 2": ParallelConfig(ring_degree=2),
    "CFG 2": ParallelConfig(cfg_parallel_degree=2),
    "one rank": ParallelConfig(),
}
FAMILIES = ("sd3", "flux")
CANCELS, KILLS = 0.30, 0.05  # shares of the runs
OTHER_LAYOUT, OTHER_MODEL = 0.05, 0.40  # how often a run is of another than the one before
STEPS, SIDE, TEXT, GUIDANCE = 20, 16, 8, 3.0
SAME = 1e-4  # relative L2 of a layout to one rank: a reference that is further away is wrong itself
SECONDS = 120.0  # a run that takes longer hangs
STUCK = 600.0  # and one that never ends is shown with all stacks
WARM = 8  # runs in which new ranks load both models and fill caches
MIB = 1 << 20


@dataclass(frozen=True)
class Looked:
    """What a run left: of the host, and the most of any rank. Bytes are resident."""

    host_bytes: int
    host_descriptors: int
    host_threads: int
    rank_bytes: int
    rank_descriptors: int
    rank_threads: int
    generation: int  # a number of the ranks' processes
    age: int  # runs that these processes have done

    @classmethod
    def at(cls, pids: list[int], generation: int, age: int) -> Looked:
        """What there is now."""
        ranks = [_resources(pid) for pid in pids]
        return cls(
            *_resources(os.getpid()), *(max(values) for values in zip(*ranks, strict=True)), generation, age
        )


def _resources(pid: int) -> tuple[int, int, int]:
    process = psutil.Process(pid)
    with process.oneshot():
        return process.memory_info().rss, process.num_fds(), process.num_threads()


class Soak:
    """The runs, one after the other.

    Args:
        folder: for the models.
        seed: of everything that is chosen at random.
    """

    def __init__(self, folder: Path, seed: int):
        self._random = random.Random(seed)
        self._models = tiny.write_models(folder)
        self.counts: Counter[str] = Counter()
        self.looks: list[Looked] = []
        self._ages: Counter[int] = Counter()
        self._expected = {
            (layout, family): self._draw(layout, family) for layout in LAYOUTS for family in FAMILIES
        }
        for (layout, family), latent in self._expected.items():
            difference = tiny.relative_l2(latent, self._expected["one rank", family])
            if difference > SAME:
                raise AssertionError(f"{family} with {layout} is {difference:.1e} from one rank")
        self._place = ("Ulysses 2", "sd3")
        self._kept: RemoteModel | None = None

    def run(self) -> None:
        """One: perhaps of another layout or model, perhaps cancelled or with a rank that is killed."""
        self._move()
        choice = self._random.random()
        began = time.monotonic()
        if choice < KILLS:
            self._killed()
        elif choice < KILLS + CANCELS:
            self._cancelled()
        else:
            self._plain()
        if time.monotonic() - began > SECONDS:
            self.counts["hung"] += 1
        group = worker_group(LAYOUTS[self._place[0]])
        if group.pids:
            self._ages[group.pids[0]] += 1
            self.looks.append(Looked.at(group.pids, group.pids[0], self._ages[group.pids[0]]))

    def _move(self) -> None:
        layout, family = self._place
        if self._random.random() < OTHER_LAYOUT:
            layout = self._random.choice([other for other in LAYOUTS if other != layout])
            self.counts["other layouts"] += 1
        if self._random.random() < OTHER_MODEL:
            family = self._random.choice([other for other in FAMILIES if other != family])
            self.counts["other models"] += 1
        self._place = layout, family

    def _plain(self) -> None:
        self.counts["drawn"] += 1
        if not torch.equal(self._draw(*self._place), self._expected[self._place]):
            self.counts["wrong"] += 1

    def _cancelled(self) -> None:
        last = self._random.randrange(STEPS)
        seen: list[int] = []
        try:
            latent = self._draw(*self._place, lambda p: seen.append(p.step), lambda: len(seen) >= last)
        except Interrupted:
            self.counts["cancelled"] += 1
            return
        self.counts["cancelled too late"] += 1
        if not torch.equal(latent, self._expected[self._place]):
            self.counts["wrong"] += 1

    def _killed(self) -> None:
        step = self._random.randrange(1, STEPS)
        group = worker_group(LAYOUTS[self._place[0]])
        rank = self._random.randrange(group.parallel.world_size)

        def kill(progress: Progress) -> None:
            if progress.step == step:
                os.kill(group.pids[rank], signal.SIGKILL)

        try:
            latent = self._draw(*self._place, kill)
        except WorkerDied:
            self.counts["killed"] += 1
        else:
            self.counts["killed too late"] += 1
            if not torch.equal(latent, self._expected[self._place]):
                self.counts["wrong"] += 1
        self._plain()  # the next one starts new ranks

    def _draw(
        self,
        layout: str,
        family: str,
        on_progress: Callable[[Progress], None] | None = None,
        interrupted: Callable[[], bool] | None = None,
    ) -> torch.Tensor:
        model = self._models[family]
        remote = RemoteModel(ModelSpec.of(model.file, "transformer"), LAYOUTS[layout])
        noise = torch.randn(1, 16, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
        positive, negative = (tiny.conditions(model.family, model.config, TEXT, seed=seed) for seed in (7, 8))
        sigmas = torch.linspace(1.0, 0.0, STEPS + 1)
        request = Sample(
            remote.spec, "euler", sigmas, noise * 0, noise, GUIDANCE, positive, negative, sigmas * 1000,
            previews=True,
        )  # fmt: skip
        latent = remote.sample(request, on_progress, interrupted)
        self._kept = remote  # as ComfyUI keeps what a node gave last: another layout's ranks go with it
        return latent


def slope(points: list[tuple[float, float]]) -> float:
    """Of the line with the least squares through (x, y)."""
    if len({x for x, _ in points}) < 2:
        return 0.0
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def slopes(looks: list[Looked]) -> dict[str, dict[str, float]]:
    """Least, most and slope per 100 runs; of ranks by their age, since new ones begin anew."""
    found = {}
    for who in ("host", "rank"):
        for what, unit in (("bytes", MIB), ("descriptors", 1), ("threads", 1)):
            values = [getattr(look, f"{who}_{what}") / unit for look in looks]
            points = list(zip(map(float, range(len(values))), values, strict=True))
            if who == "rank":
                points = _around_their_means(looks, values)
            name = f"{who}: {'MiB resident' if what == 'bytes' else what}"
            found[name] = {"least": min(values), "most": max(values), "slope": 100 * slope(points)}
    return found


def _around_their_means(looks: list[Looked], values: list[float]) -> list[tuple[float, float]]:
    """(age, value) of every generation of ranks that are warm, less its own means."""
    points = []
    seen = [(look, value) for look, value in zip(looks, values, strict=True) if look.age > WARM]
    for generation in dict.fromkeys(look.generation for look, _ in seen):
        own = [(look.age, value) for look, value in seen if look.generation == generation]
        ages, mean = (statistics.fmean(column) for column in zip(*own, strict=True))
        points += [(age - ages, value - mean) for age, value in own]
    return points


def main() -> None:
    """Run, count, show, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-page", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="comfy_xdit_soak_") as folder:
        soak = Soak(Path(folder), arguments.seed)
        for number in range(arguments.runs):
            faulthandler.dump_traceback_later(STUCK, exit=True)
            soak.run()
            if (number + 1) % 50 == 0:
                print(f"{number + 1} runs, {time.monotonic() - began:.0f} s, {dict(soak.counts)}", flush=True)
        faulthandler.cancel_dump_traceback_later()
        for group in running_groups():
            group.close()
    seconds, found = time.monotonic() - began, slopes(soak.looks)
    counts = ", ".join(f"{soak.counts[name]} {name}" for name in sorted(soak.counts))
    words = (
        f"{arguments.runs} runs in {seconds / 60:.0f} minutes (seed {arguments.seed}): {counts}; "
        f"{soak.counts['wrong']} wrong pictures, {soak.counts['hung']} hangs."
    )
    print(words)
    for name, row in found.items():
        print(f"{name:22} {row['least']:8.1f} to {row['most']:8.1f} {row['slope']:+10.3f} per 100 runs")
    if not arguments.no_page:
        result: dict[str, Any] = {"words": words, "slopes": found}
        page.write("soak", result)
    sys.exit(1 if soak.counts["wrong"] or soak.counts["hung"] else 0)


if __name__ == "__main__":
    main()
