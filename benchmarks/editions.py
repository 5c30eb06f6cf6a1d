"""Two editions of this project side by side: does a change cost speed? Part of `make bench`.

Each holds its own ranks for one way at a time (`benchmarks.speed` of that edition says what a way is), and
they take turns, so that a busy machine is busy for both. Printed is the median over the turns of this
edition's seconds by the other's, each turn against its neighbour in time, and the middle half of the turns.
"one rank" runs the same code in both: it shows what such a figure is worth here and now.

Without a checkout the other edition is the last one before the plan and the seam, from this one's history.

Usage: python -m benchmarks.editions [OTHER_CHECKOUT] [--rounds 12] [--ways "Ulysses 2" ...]
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import product
from pathlib import Path

from benchmarks.speed import SIDES, WAYS

HERE = Path(__file__).parent.parent
BEFORE = "3fa493a"  # xfuser's processors per class, and stages of PipeFusion written by hand
COMPARED = (
    (1024, "one rank"), (1024, "Ulysses 2"), (1024, "Ring 2"), (1024, "PipeFusion 2"), (4096, "Ulysses 2"),
    (4096, "Ring 2"),
)  # fmt: skip
LIMITS = {"Ulysses 2": 1.02, "Ring 2": 1.02, "PipeFusion 2": 1.03}  # of the other's seconds, at most
# Of a loop; of PipeFusion, whose first step is not parallel, more.
STEPS = {1024: 8, 4096: 2}
PIPEFUSION_STEPS = 12
# Run in the folder of each edition; a line on its standard input is a turn.
LOOP = """
import sys, tempfile
from dataclasses import replace
from pathlib import Path
import torch
from benchmarks import speed
torch.set_num_threads(1)
with tempfile.TemporaryDirectory() as folder:
    problem = speed.Problem(Path(folder), int(sys.argv[2]))
    way = next(way for way in speed.WAYS if way.name == sys.argv[1])
    run = problem.ours(replace(way, steps=int(sys.argv[3])))
    for _ in sys.stdin:
        print("seconds", run(), flush=True)
    speed._end_ranks()
"""


class NoHistory(Exception):
    """The other edition is not in this checkout's history."""


def write_edition(folder: Path, commit: str = BEFORE) -> None:
    """Have the files of a commit in an empty folder.

    Raises:
        NoHistory: this is no git checkout, or a shallow one.
    """
    command = ["git", "-C", str(HERE), "archive", "--format=tar", commit]
    try:
        found = subprocess.run(command, capture_output=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        said = error.stderr.decode().strip() if isinstance(error, subprocess.CalledProcessError) else error
        raise NoHistory(
            f"no comparison with the edition before: its commit {commit} is not at hand ({said}); clone the "
            "whole history, or name a checkout of it."
        ) from error
    with tarfile.open(fileobj=io.BytesIO(found.stdout)) as files:
        files.extractall(folder, filter="data")


@contextmanager
def edition(checkout: Path, way: str, tokens: int) -> Iterator[Callable[[], float]]:
    """Ranks of one edition; the answer runs a loop in them and returns seconds."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "XDIT_OMP_NUM_THREADS": "1"}
    steps = PIPEFUSION_STEPS if "PipeFusion" in way else STEPS[tokens]
    process = subprocess.Popen(
        [sys.executable, "-c", LOOP, way, str(tokens), str(steps)],
        cwd=checkout, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip

    def turn() -> float:
        process.stdin.write("\n")
        process.stdin.flush()
        for line in process.stdout:
            if line.startswith("seconds "):
                return float(line.split()[1])
        raise RuntimeError(f"{checkout} ended in the middle of {way} at {tokens} tokens")

    with process:
        yield turn
        process.stdin.close()


def compare(other: Path, way: str, tokens: int, rounds: int) -> tuple[float, list[float]]:
    """This edition's median seconds, and its seconds by the other's of every turn, sorted."""
    with ExitStack() as stack:
        turns = [stack.enter_context(edition(checkout, way, tokens)) for checkout in (HERE, other)]
        for turn in turns:
            turn()  # starts, loads, warms up
        # Who begins changes with every turn: the second finds warmer caches.
        times = [(turns[0](), turns[1]()) if i % 2 else (turns[1](), turns[0]())[::-1] for i in range(rounds)]
    return statistics.median(t[0] for t in times), sorted(ours / theirs for ours, theirs in times)


def table(other: Path, compared: list[tuple[int, str]], rounds: int) -> Iterator[str]:
    """Lines of Markdown."""
    yield "| image tokens | way | seconds per loop | by the other's | middle half | limit |"
    yield "|---|---|---|---|---|---|"
    for tokens, way in compared:
        seconds, ratios = compare(other, way, tokens, rounds)
        found, limit = statistics.median(ratios), LIMITS.get(way)
        middle = f"{ratios[rounds // 4]:.3f} to {ratios[-1 - rounds // 4]:.3f}"
        said = "" if limit is None else f"{limit:g}: {'held' if found <= limit else 'OVER'}"
        yield f"| {tokens} | {way} | {seconds:.3f} | {found:.3f} | {middle} | {said} |"


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("other", type=Path, nargs="?")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--tokens", type=int, nargs="+", choices=SIDES)
    parser.add_argument("--ways", nargs="+", choices=[way.name for way in WAYS])
    arguments = parser.parse_args()
    compared = list(COMPARED)
    if arguments.tokens or arguments.ways:
        compared = list(product(arguments.tokens or SIDES, arguments.ways or [way.name for way in WAYS]))
    with tempfile.TemporaryDirectory(prefix="comfy_xdit_edition_") as folder:
        other = arguments.other
        if other is None:
            other = Path(folder)
            try:
                write_edition(other)
            except NoHistory as why:
                print(why)
                return
        print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores, {arguments.rounds} turns")
        for line in table(other.resolve(), compared, arguments.rounds):
            print(line, flush=True)


if __name__ == "__main__":
    main()
