"""`make fuzz MESSAGES=... HEADERS=...`: bad messages and bad files, by the hundred thousand.

Messages go through both ends of a real bridge, headers of safetensors files through every reader of them
(tests/fuzzed_messages.py and fuzzed_headers.py say how they are made). Of each comes what was sent, or an
error of ours. Batches are made by seeds: one that fails is run again with `--seed`, and so is what was left
of a run.
"""

from __future__ import annotations

import argparse
import faulthandler
import itertools
import os
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["XDIT_OMP_NUM_THREADS"] = "1"

import psutil
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from benchmarks.faults import page
from tests.fuzzed_messages import Bridge, answers, commands

OF_EACH = 60  # bad messages that are made of a good one
DRAWN = 20  # by hypothesis in a batch, for each end
HEADERS, MODELS = 300, 10  # of a batch: any bytes, and files of models, which take longer
STUCK = 300.0  # seconds of a batch that hangs
MIB = 1 << 20


def drawn(number: int, count: int, strategy: st.SearchStrategy[Any], check: Callable[[Any], None]) -> None:
    """`check` of so many values; the same ones for the same seed."""

    @seed(number)
    @settings(
        max_examples=count, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(strategy)
    def each(value: Any) -> None:
        check(value)

    each()


class Messages:
    """To the host and to a rank in turn."""

    def __init__(self, _folder: Path):
        self._bridge = Bridge()
        self.counts = self._bridge.counts

    @property
    def done(self) -> int:
        """How many were sent."""
        return self.counts.total()

    def batch(self, number: int) -> None:
        """Some thousands."""
        for to_rank, words in ((False, answers), (True, commands)):
            both = st.tuples(words, st.integers(0, 2**32))
            drawn(
                number,
                DRAWN,
                both,
                lambda m, to_rank=to_rank: self._bridge.spoilt(m[0], to_rank, m[1], OF_EACH),
            )

    def close(self) -> None:
        """End the bridge."""
        self._bridge.close()


class Headers:
    """Any bytes through the reader of headers, changed files of models through the readers of models."""

    def __init__(self, folder: Path):
        from tests import fuzzed_headers, tiny  # of the engine, which messages do without

        self._file = folder / "fuzz.safetensors"
        (folder / "models").mkdir()
        (folder / "nets").mkdir()
        self._tools = fuzzed_headers
        self._readers = fuzzed_headers.readers(tiny.write_models(folder / "models"), folder / "nets")
        self.counts: Counter[str] = Counter()

    @property
    def done(self) -> int:
        """How many were read."""
        return self.counts.total()

    def batch(self, number: int) -> None:
        """Some hundreds."""
        drawn(number, HEADERS, self._tools.mutated(), self._bytes)
        drawn(number, MODELS, st.data(), self._model)

    def close(self) -> None:
        """Nothing runs."""

    def _bytes(self, content: bytes) -> None:
        self._tools.check_bytes(self._file, content)
        self.counts["any bytes"] += 1

    def _model(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self._readers)))
        read, shapes = self._readers[name]
        self._tools.check_model(self._file, read, data.draw(self._tools.changed(shapes)))
        self.counts["files of models"] += 1


def run(name: str, count: int, first: int) -> str:
    """At least `count`, from the batch `first` on; what came of them in words."""
    began, memory = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="comfy_xdit_fuzz_") as folder:
        part = PARTS[name](Path(folder))
        for number in itertools.count(first):
            faulthandler.dump_traceback_later(STUCK, exit=True)
            try:
                part.batch(number)
            except BaseException:
                print(f"failed; again with --only {name} --seed {number}", flush=True)
                raise
            memory.append(psutil.Process().memory_info().rss / MIB)
            seconds = time.monotonic() - began
            print(f"{part.done:9,} {name}, seed {number}, {seconds:.0f} s, {dict(part.counts)}", flush=True)
            if part.done >= count:
                break
        faulthandler.cancel_dump_traceback_later()
        part.close()
    counts = ", ".join(f"{n:,} {what}" for what, n in sorted(part.counts.items()))
    grown = memory[-1] - memory[len(memory) // 10]  # the first ones import libraries
    return (
        f"{part.done:,} {name} in {seconds / 60:.0f} minutes, seeds {first} to {number}: {counts}; "
        f"{grown:+.0f} MiB resident since a tenth of them."
    )


PARTS: dict[str, type[Messages] | type[Headers]] = {"messages": Messages, "headers": Headers}


def main() -> None:
    """Send, read, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--messages", type=int, default=1_000_000)
    parser.add_argument("--headers", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0, help="of the first batch")
    parser.add_argument("--only", choices=PARTS, help="one of both; the page is not written")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of torch and diffusers, about sizes of nothing
    faulthandler.enable()
    lines = [
        run(name, getattr(arguments, name), arguments.seed)
        for name in PARTS
        if arguments.only in (None, name)
    ]
    print(*lines, sep="\n")
    if arguments.only is None:
        page.write("fuzz", {"lines": lines})


if __name__ == "__main__":
    main()
