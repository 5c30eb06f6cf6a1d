"""The bridge beside two plain ways between processes, in one run: `make bench`.

A round trip is a denoise call without the transformer: the latent goes to every rank, rank 0 sends
it back. Beside it: a multiprocessing pipe per rank (pickled numpy), and shared memory with a pipe to
say "there it is". The three take turns, so that a busy machine is busy for all of them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import shared_memory
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch

from comfy_xdit.protocol.messages import Denoise
from comfy_xdit.protocol.parallel import ParallelConfig
from comfy_xdit.protocol.spec import ModelSpec
from comfy_xdit.ranks.group import WorkerGroup

KIB, MIB = 1 << 10, 1 << 20
SIZES = {"512 KiB": 512 * KIB, "4 MiB": 4 * MIB, "64 MiB": 64 * MIB}
ROUNDS = {"512 KiB": 200, "4 MiB": 60, "64 MiB": 8}
RANKS = (1, 2, 4)
LIMIT = 1.5  # ms: of 512 KiB at two ranks
Trip = Callable[[torch.Tensor], None]


@contextmanager
def bridge(ranks: int) -> Iterator[Trip]:
    """Our own: TCPStore queues and inherited shared memory."""
    group = WorkerGroup(ParallelConfig(ulysses_degree=ranks), program="benchmarks.echo")
    spec, time_ = ModelSpec("", "transformer"), torch.ones(1)

    def trip(x: torch.Tensor) -> None:
        group.call(Denoise(spec, x, time_, {}))

    try:
        yield trip
    finally:
        group.close()


@contextmanager
def pipes(ranks: int) -> Iterator[Trip]:
    """One multiprocessing pipe per rank, everything pickled."""
    with _processes(ranks, _pipe_rank, ()) as ends:

        def trip(x: torch.Tensor) -> None:
            for end in ends:
                end.send(x.numpy())
            for end in ends:
                end.recv()

        yield trip


@contextmanager
def shared(ranks: int) -> Iterator[Trip]:
    """A named block of shared memory each way, and pipes for the word."""
    size = max(SIZES.values())
    down = shared_memory.SharedMemory(create=True, size=size)
    up = shared_memory.SharedMemory(create=True, size=size)
    try:
        with _processes(ranks, _shared_rank, (down.name, up.name)) as ends:

            def trip(x: torch.Tensor) -> None:
                array = x.numpy()
                np.ndarray(array.shape, array.dtype, down.buf)[:] = array
                for end in ends:
                    end.send(array.shape)
                for end in ends:
                    end.recv()
                np.ndarray(array.shape, array.dtype, up.buf).copy()

            yield trip
    finally:
        for block in (down, up):
            block.close()
            block.unlink()


@contextmanager
def _processes(
    ranks: int, target: Callable[..., None], arguments: tuple[str, ...]
) -> Iterator[list[Connection]]:
    context = multiprocessing.get_context("spawn")
    pairs = [context.Pipe() for _ in range(ranks)]
    processes = [
        context.Process(target=target, args=(far, rank, *arguments), daemon=True)
        for rank, (_, far) in enumerate(pairs)
    ]
    for process in processes:
        process.start()
    ends = [near for near, _ in pairs]
    for end in ends:
        end.recv()  # started
    try:
        yield ends
    finally:
        for end in ends:
            end.send(None)
        for process in processes:
            process.join()


def _pipe_rank(end: Connection, rank: int) -> None:
    end.send("started")
    while (array := end.recv()) is not None:
        end.send(array if rank == 0 else None)


def _shared_rank(end: Connection, rank: int, down_name: str, up_name: str) -> None:
    down, up = shared_memory.SharedMemory(down_name), shared_memory.SharedMemory(up_name)
    end.send("started")
    while (shape := end.recv()) is not None:
        copy = np.ndarray(shape, np.float32, down.buf).copy()
        if rank == 0:
            np.ndarray(shape, np.float32, up.buf)[:] = copy
        end.send(None)
    down.close()
    up.close()


WAYS = {"bridge": bridge, "pipe": pipes, "shared memory": shared}


def measure(ranks: int) -> dict[str, dict[str, float]]:
    """Median milliseconds per way and size; the ways take turns within every round."""
    result: dict[str, dict[str, float]] = {way: {} for way in WAYS}
    with bridge(ranks) as a, pipes(ranks) as b, shared(ranks) as c:
        trips = dict(zip(WAYS, (a, b, c), strict=True))
        for name, size in SIZES.items():
            x = torch.rand(size // 4)
            times: dict[str, list[float]] = {way: [] for way in WAYS}
            for turn in range(ROUNDS[name] + 2):
                for way, trip in trips.items():
                    began = time.perf_counter()
                    trip(x)
                    if turn >= 2:  # the first touches of fresh memory are not the steady state
                        times[way].append(time.perf_counter() - began)
            for way in WAYS:
                result[way][name] = 1000 * statistics.median(times[way])
    return result


def main() -> None:
    """Measure, print a table, write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("output/bridge.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["XDIT_OMP_NUM_THREADS"] = "1"  # the other ways copy with one thread as well
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; median ms per round trip")
    print(f"{'ranks':>5}  {'way':14}" + "".join(f"{size:>10}" for size in SIZES))
    results = {}
    for ranks in RANKS:
        results[ranks] = measure(ranks)
        for way, medians in results[ranks].items():
            print(f"{ranks:>5}  {way:14}" + "".join(f"{medians[size]:>10.2f}" for size in SIZES))
    found = results[2]["bridge"]["512 KiB"]
    said = "held" if found <= LIMIT else "OVER THE LIMIT"
    print(f"512 KiB over the bridge to two ranks and back: {found:.2f} ms; limit {LIMIT}: {said}")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
