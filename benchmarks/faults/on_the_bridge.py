"""Faults of the bridge: what other programs of the machine write into a group's store, or at its port."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable

import torch.distributed as dist

from benchmarks.faults.plan import forget_moment, mark_moment
from benchmarks.faults.scene import DEATH, Fault, Scene, Seen
from tests.rogue import Rogue

FORGED = 10_000  # a number that no message of a run has
LOOP = 60.0  # seconds in which a loop that goes on is done
STRANGERS = 200


def _in_mid_run(write: Callable[[Rogue], None]) -> Callable[[Scene], Seen]:
    def inject(scene: Scene) -> Seen:
        rogue = Rogue(scene.group._bridge)
        return scene.see_in_mid_run(lambda: write(rogue))

    return inject


def _before(write: Callable[[Rogue], None]) -> Callable[[Scene], Seen]:
    def inject(scene: Scene) -> Seen:
        rogue = Rogue(scene.group._bridge)
        return scene.see_a_job(lambda: write(rogue))

    return inject


def _corrupt(rogue: Rogue) -> None:
    """A message of rank 0's with one bit changed."""
    sealed = bytearray(rogue.signer.seal("events/0", FORGED, {"job": 1, "body": None, "tensors": []}))
    sealed[-3] ^= 1
    rogue.store.queue_push("events", bytes(sealed))


def _interrupt_all(rogue: Rogue) -> None:
    for job in range(1, 2000):
        rogue.store.set(f"interrupt/{job}", b"1")


def _knock(rogue: Rogue) -> None:
    """Words that are not the store's, from many connections."""
    for number in range(STRANGERS):
        with socket.create_connection(("127.0.0.1", rogue.store.port), timeout=5) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n" if number % 2 else bytes(1000))


def _other_secret(rogue: Rogue) -> None:
    rogue.signer = type(rogue.signer)("of another group")
    rogue.push("events", "events/0", 0)


def _name_too_much(rogue: Rogue) -> None:
    beyond = [{"dtype": "float32", "shape": [1 << 30], "offset": 64}]
    rogue.push("events", "events/1", rogue.expected("events/1"), tensors=beyond)


def _take(rogue: Rogue) -> None:
    """One of many, which the host reads as well."""
    taken = b""
    while not taken:
        with contextlib.suppress(dist.QueueEmptyError):  # the host was faster
            taken = rogue.store.queue_pop("events")
    forget_moment()
    mark_moment()


SAYS = "bad signature"
FAULTS = [
    Fault(
        "bridge", "an empty message", DEATH, SAYS, _in_mid_run(lambda r: r.store.queue_push("events", b""))
    ),
    Fault(
        "bridge",
        "an unsigned message",
        DEATH,
        SAYS,
        _in_mid_run(lambda r: r.store.queue_push("events", b"x" * 500)),
    ),
    Fault("bridge", "a corrupted message", DEATH, SAYS, _in_mid_run(_corrupt)),
    Fault("bridge", "a message of another group", DEATH, SAYS, _in_mid_run(_other_secret)),
    Fault(
        "bridge",
        "a replayed message",
        DEATH,
        "message 0 on events/0, expected",
        _in_mid_run(lambda r: r.push("events", "events/0", 0)),
    ),
    Fault(
        "bridge",
        "a message for another receiver",
        DEATH,
        "a message of the route 'commands/1'",
        _in_mid_run(lambda r: r.push("events", "commands/1", 0)),
    ),
    Fault(
        "bridge",
        "a message that names memory beyond the segment",
        DEATH,
        "names",
        _in_mid_run(_name_too_much),
    ),
    Fault(
        "bridge",
        "an unsigned command",
        DEATH,
        "rank 1 .*bad signature|rank 1 [\\s\\S]*Unsigned",
        _before(lambda r: r.store.queue_push("commands/1", b"x" * 500)),
    ),
    Fault(
        "bridge",
        "a replayed command",
        DEATH,
        "rank 0 [\\s\\S]*message 0 on commands/0, expected",
        _before(lambda r: r.push("commands/0", "commands/0", 0)),
    ),
    Fault("bridge", "unsigned interrupts of all jobs", LOOP, None, _before(_interrupt_all), keeps=True),
    Fault("bridge", f"{STRANGERS} strangers talk to the port", LOOP, None, _before(_knock), keeps=True),
    Fault(
        "bridge",
        "a message is taken away",
        DEATH,
        "on events/0, expected|queue is empty",
        _in_mid_run(_take),
    ),
]
