"""The bridge: RPC on torch.distributed's TCPStore. The only file that knows the transport.

Each rank has a queue of commands, the host one queue of events. A message is a JSON head, signed
with HMAC-SHA256 over queue, sender, sequence number and bytes; its tensors lie in shared memory.
The secret goes to a rank over its standard input. The store listens on 127.0.0.1 only: given a
host name it would bind every interface, so it is given a bound socket.
"""

from __future__ import annotations

import hmac
import json
import queue
import secrets
import socket
import threading
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from comfy_xdit.protocol.errors import WorkerDied
from comfy_xdit.protocol.messages import Progress, flatten, rebuild
from comfy_xdit.protocol.shared_memory import ALIGNMENT, HEADER_BYTES, Segment

LOOPBACK = "127.0.0.1"
IDLE = timedelta(days=3650)  # a rank waits for its next command as long as its host lives
OPERATION = timedelta(seconds=60)
# TCPStore breaks the connection for good above 8 MiB; heads are far smaller.
HEAD_LIMIT = 4 << 20
HEARTBEAT_SECONDS = 0.5
EVENTS = "events"


@dataclass(frozen=True)
class Invitation:
    """What a rank needs to join: written as one JSON line to its standard input."""

    rank: int
    world_size: int
    port: int
    secret: str
    inbound: int
    outbound: int
    host_pid: int
    degrees: dict[str, int]  # and whether weights are sharded

    def line(self) -> bytes:
        """The invitation as one line."""
        return json.dumps(asdict(self)).encode() + b"\n"

    @classmethod
    def read(cls, line: bytes) -> Invitation:
        """The invitation from its line."""
        return cls(**json.loads(line))


class _Signed:
    """Messages with a signature over sender, receiver, place in the sequence, and content."""

    def __init__(self, secret: str):
        self._key = secret.encode()

    def seal(self, route: str, sequence: int, head: dict[str, Any]) -> bytes:
        body = json.dumps({"route": route, "sequence": sequence, **head}).encode()
        if len(body) > HEAD_LIMIT:
            raise ValueError(
                f"a message head of {len(body)} bytes is over {HEAD_LIMIT}; send tensors instead"
            )
        return hmac.digest(self._key, body, "sha256") + body

    def open(self, sealed: bytes) -> dict[str, Any]:
        mac, body = sealed[:32], sealed[32:]
        if not hmac.compare_digest(mac, hmac.digest(self._key, body, "sha256")):
            raise WorkerDied("a message on the bridge has a bad signature; the group is stopped")
        return json.loads(body)


class _Sequence:
    """Counts what was sent on a route and checks what is received: nothing lost, nothing replayed."""

    def __init__(self) -> None:
        self._next: dict[str, int] = {}

    def next(self, route: str) -> int:
        """The number of the next message."""
        return self._next.get(route, 0)

    def take(self, route: str) -> int:
        """The number of the message that is on its way now."""
        number = self.next(route)
        self._next[route] = number + 1
        return number

    def check(self, head: dict[str, Any]) -> None:
        if head["sequence"] != (expected := self.take(head["route"])):
            raise WorkerDied(f"message {head['sequence']} on {head['route']}, expected {expected}")


@dataclass(frozen=True)
class Event:
    """Something happened: a rank's message, its end, or `fault` when the bridge itself failed.

    `nbytes` is what crossed the bridge for it.
    """

    rank: int
    job: int = -1
    message: Any = None
    nbytes: int = 0
    exit_code: int | None = None
    fault: BaseException | None = None


class Host:
    """The host's end: one store, a segment of memory to the ranks and one from each."""

    def __init__(self, world_size: int, host_pid: int, degrees: dict[str, int]):
        listener = socket.socket()
        listener.bind((LOOPBACK, 0))
        listener.listen(4 * world_size + 16)
        self._port = listener.getsockname()[1]
        self._store = dist.TCPStore(
            LOOPBACK, self._port, None, True, OPERATION, wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )  # fmt: skip
        self._secret = secrets.token_hex(32)
        self._signed, self._sequence, self._seen = _Signed(self._secret), _Sequence(), _Sequence()
        self._outbound = Segment()
        self._inbound = [Segment() for _ in range(world_size)]
        self._host_pid, self._degrees = host_pid, degrees
        self.inbox: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, args=(self._store.clone(),), daemon=True)
        self._reader.start()

    def invitation(self, rank: int) -> Invitation:
        """What the process of `rank` must be told."""
        return Invitation(
            rank, len(self._inbound), self._port, self._secret,
            self._outbound.descriptor, self._inbound[rank].descriptor, self._host_pid, self._degrees,
        )  # fmt: skip

    def send(self, ranks: list[int], job: int, message: Any) -> int:
        """Give `message` to every rank of `ranks`; its tensors are written once.

        Returns:
            The bytes that were written: tensors once, the head for every rank.
        """
        flat = flatten(message)
        head = {"job": job, "body": flat.head, "tensors": self._outbound.write(flat.tensors)}
        routes = [f"commands/{rank}" for rank in ranks]
        # Sealed first: a head that is too long is refused before any rank has got one.
        sealed = [self._signed.seal(route, self._sequence.next(route), head) for route in routes]
        for route, envelope in zip(routes, sealed, strict=True):
            self._sequence.take(route)
            self._store.queue_push(route, envelope)
        return sum(tensor.nbytes for tensor in flat.tensors) + sum(map(len, sealed))

    def wait(self, seconds: float) -> Event | None:
        """The next event, or None when none came within `seconds`."""
        try:
            return self.inbox.get(timeout=seconds)
        except queue.Empty:
            return None

    def silent_for(self, rank: int) -> float:
        """Seconds since the process of `rank` last showed that it runs; 0 before the first time."""
        last = self._inbound[rank].heartbeat
        return time.monotonic() - last if last else 0.0

    def interrupt(self, job: int) -> None:
        """Ask the ranks to stop `job` at the next step boundary."""
        self._store.set(f"interrupt/{job}", b"1")

    def close(self) -> None:
        """End the reader and release memory and store. Call it when no rank is alive."""
        self._store.queue_push(EVENTS, b"")
        self._reader.join(OPERATION.total_seconds())
        for segment in (self._outbound, *self._inbound):
            segment.close()
        del self._store

    def _read(self, store: dist.Store) -> None:
        """Move events from the store to the inbox until an empty one arrives."""
        store.set_timeout(IDLE)
        try:
            while sealed := store.queue_pop(EVENTS):
                head = self._signed.open(sealed)
                self._seen.check(head)
                rank = head["rank"]
                tensors = self._inbound[rank].read(head["tensors"])
                self._inbound[rank].acknowledged = head["sequence"] + 1
                crossed = len(sealed) + sum(tensor.nbytes for tensor in tensors)
                self.inbox.put(Event(rank, head["job"], rebuild(head["body"], tensors), crossed))
        except (WorkerDied, RuntimeError, ValueError, KeyError) as fault:
            self.inbox.put(Event(-1, fault=fault))


class Rank:
    """A rank's end of the bridge."""

    def __init__(self, invitation: Invitation):
        self.rank, self.world_size = invitation.rank, invitation.world_size
        self._store = dist.TCPStore(LOOPBACK, invitation.port, None, False, OPERATION)
        self._commands = self._store.clone()
        self._commands.set_timeout(IDLE)
        self._signed, self._sequence, self._seen = _Signed(invitation.secret), _Sequence(), _Sequence()
        self._inbound, self._outbound = Segment(invitation.inbound), Segment(invitation.outbound)
        self._preview_end, self._preview_sent = HEADER_BYTES, 0
        threading.Thread(target=self._show_life, daemon=True, name="heartbeat").start()

    def group_store(self) -> dist.Store:
        """The store by which the ranks form their own process group."""
        return dist.PrefixStore("group", self._store.clone())

    def receive(self, device: torch.device | str) -> tuple[int, Any]:
        """Wait for the next command; its tensors are copied to `device`."""
        head = self._signed.open(self._commands.queue_pop(f"commands/{self.rank}"))
        self._seen.check(head)
        return head["job"], rebuild(head["body"], self._inbound.read(head["tensors"], device))

    def send(self, job: int, message: Any) -> None:
        """Give `message`, the last of `job`, to the host.

        It lies behind the region of previews, one of which the host may still be reading.
        """
        self._push(job, message, self._preview_end)

    def progress(self, job: int, step: int, steps: int, preview: torch.Tensor | None) -> None:
        """Report a step. The preview is left out while the host has not read the one before."""
        if preview is not None:
            if self._outbound.acknowledged < self._preview_sent:
                preview = None
            else:
                self._preview_end = max(self._preview_end, HEADER_BYTES + preview.nbytes + ALIGNMENT)
        number = self._push(job, Progress(step, steps, preview), HEADER_BYTES)
        if preview is not None:
            self._preview_sent = number + 1

    def interrupted(self, job: int) -> bool:
        """True when the host asked to stop `job`."""
        return self._store.check([f"interrupt/{job}"])

    def _show_life(self) -> None:
        """A process that is stopped, or whose interpreter hangs, does not end: only this tells."""
        while True:
            self._outbound.heartbeat = time.monotonic()
            time.sleep(HEARTBEAT_SECONDS)

    def _push(self, job: int, message: Any, base: int) -> int:
        flat = flatten(message)
        entries = self._outbound.write(flat.tensors, base) if flat.tensors else []
        head = {"job": job, "rank": self.rank, "body": flat.head, "tensors": entries}
        route = f"events/{self.rank}"
        number = self._sequence.take(route)
        self._store.queue_push(EVENTS, self._signed.seal(route, number, head))
        return number
