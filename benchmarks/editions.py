"""Two checkouts of this project side by side: does a change cost speed?

Each holds its own ranks for one way at a time (`benchmarks.speed` of that checkout says what a way is), and
they take turns, so that a busy machine is busy for both. Printed is the median over the turns of this
checkout's seconds by the other's, each turn against its neighbour in time.

Usage: python -m benchmarks.editions OTHER_CHECKOUT [--rounds 12] [--ways "Ulysses 2" ...]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks.speed import SIDES, WAYS

HERE = Path(__file__).parent.parent
# Run in the folder of each checkout; a line on its standard input is a turn.
LOOP = """
import sys, tempfile
from pathlib import Path
import torch
from benchmarks import speed
torch.set_num_threads(1)
with tempfile.TemporaryDirectory() as folder:
    problem = speed.Problem(Path(folder), int(sys.argv[2]))
    run = problem.ours(next(way for way in speed.WAYS if way.name == sys.argv[1]))
    for _ in sys.stdin:
        print("seconds", run(), flush=True)
    speed._end_ranks()
"""


@contextmanager
def edition(checkout: Path, way: str, tokens: int) -> Iterator[Callable[[], float]]:
    """Ranks of one checkout; the answer runs a loop in them and returns seconds."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "XDIT_OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", LOOP, way, str(tokens)],
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


def compare(other: Path, way: str, tokens: int, rounds: int) -> tuple[float, float]:
    """Medians over the turns: this checkout's seconds by the other's, and its seconds."""
    with ExitStack() as stack:
        turns = [stack.enter_context(edition(checkout, way, tokens)) for checkout in (HERE, other)]
        for turn in turns:
            turn()  # starts, loads, warms up
        # Who begins changes with every turn: the second finds warmer caches.
        times = [(turns[0](), turns[1]()) if i % 2 else (turns[1](), turns[0]())[::-1] for i in range(rounds)]
    return statistics.median(ours / theirs for ours, theirs in times), statistics.median(t[0] for t in times)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("other", type=Path)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--tokens", type=int, nargs="+", choices=SIDES, default=list(SIDES))
    every = [way.name for way in WAYS]
    parser.add_argument("--ways", nargs="+", choices=every, default=every)
    arguments = parser.parse_args()
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores, {arguments.rounds} turns")
    print("| image tokens | way | seconds per loop | by the other's |\n|---|---|---|---|", flush=True)
    for tokens in arguments.tokens:
        for way in arguments.ways:
            ratio, seconds = compare(arguments.other.resolve(), way, tokens, arguments.rounds)
            print(f"| {tokens} | {way} | {seconds:.3f} | {ratio:.3f} |", flush=True)


if __name__ == "__main__":
    main()
