"""The bridge: RPC on torch.distributed's TCPStore. The only file that knows the transport.

Each rank has a queue of commands, the host one queue of events. A message is a JSON head, signed
(see signed.py); its tensors lie in shared memory. The secret goes to a rank over its standard input.
The store listens on 127.0.0.1 only: given a host name it would bind every interface, so it is given
a bound socket. docs/security.md lists what lies in the store.
"""

from __future__ import annotations

import hmac
import json
import mmap
import os
import queue
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from comfy_xdit.protocol.messages import ANSWERS, Progress
from comfy_xdit.protocol.plain import check_fields, flatten, rebuild
from comfy_xdit.protocol.shared_memory import ALIGNMENT, HEADER_BYTES, Segment, anonymous_file
from comfy_xdit.protocol.signed import Sequence, Signer, Unreadable, Unsigned

LOOPBACK = "127.0.0.1"
IDLE = timedelta(days=3650)  # a rank waits for its next command as long as its host lives
OPERATION = timedelta(seconds=60)
CLOSE_SECONDS = 5.0  # for the reader to end
HEARTBEAT_SECONDS = 0.5
IDLE_SHARE = 0.05  # of a core: a process that uses less waits for something, maybe for its device
EVENTS = "events"
# What a host needs at most, and more for every rank: descriptors, and addresses for stacks of threads.
DESCRIPTORS, RANK_DESCRIPTORS = 20, 10
STACKS, RANK_STACKS = 64 << 20, 16 << 20


@dataclass(frozen=True)
class Invitation:
    """What a rank needs to join: written as one JSON line to its standard input.

    `inbound`, `outbound` and `meeting` are descriptors of anonymous files that the rank inherits.
    """

    rank: int
    world_size: int
    port: int
    secret: str
    inbound: int
    outbound: int
    meeting: int
    host_pid: int
    degrees: dict[str, int]  # and whether weights are sharded
    log: str = ""  # the rank's file; empty where it has none

    @property
    def descriptors(self) -> tuple[int, ...]:
        """What the rank must inherit."""
        return self.inbound, self.outbound, self.meeting

    def line(self) -> bytes:
        """The invitation as one line."""
        return json.dumps(asdict(self)).encode() + b"\n"

    @classmethod
    def read(cls, line: bytes) -> Invitation:
        """The invitation from its line."""
        return cls(**json.loads(line))


@dataclass(frozen=True)
class Event:
    """Something happened: a rank's message, its end, or `fault` when the bridge itself failed.

    `nbytes` is what crossed the bridge for it. `closed`: somebody ends the group.
    """

    rank: int
    job: int = -1
    message: Any = None
    nbytes: int = 0
    exit_code: int | None = None
    fault: BaseException | None = None
    closed: bool = False


class Reported:
    """However what runs in this context ends, by any exception too, `inbox` learns of it.

    For the whole life of a thread: no thread of the bridge ends in silence.
    """

    def __init__(self, inbox: queue.SimpleQueue[Event], name: str):
        self._inbox, self._name = inbox, name

    def __enter__(self) -> None: ...

    def __exit__(
        self, _kind: type[BaseException] | None, fault: BaseException | None, _trace: TracebackType | None
    ) -> bool:
        self._inbox.put(Event(-1, fault=fault or EOFError(f"the {self._name} ended")))
        return True  # the inbox is where it is handled


class Host:
    """The host's end: one store, a segment of memory to the ranks and one from each.

    Raises:
        OSError, RuntimeError: the machine lacks descriptors, memory or threads for it.
    """

    def __init__(self, world_size: int, host_pid: int, degrees: dict[str, int], logs: tuple[str, ...] = ()):
        self._secret = secrets.token_hex(32)
        self._signer, self._sequence, self._seen = Signer(self._secret), Sequence(), Sequence()
        self._routes = tuple(f"{EVENTS}/{rank}" for rank in range(world_size))
        self._host_pid, self._degrees, self._logs = host_pid, degrees, logs
        self._closing = False
        self.inbox: queue.SimpleQueue[Event] = queue.SimpleQueue()
        _check_room(world_size)
        with ExitStack() as undo:  # what could be had is given back when something cannot
            listener = undo.enter_context(socket.socket())
            listener.bind((LOOPBACK, 0))
            listener.listen(4 * world_size + 16)
            self._port = listener.getsockname()[1]
            segments = [undo.enter_context(closing(Segment())) for _ in range(world_size + 1)]
            self._outbound, self._inbound = segments[0], segments[1:]
            self._meeting = anonymous_file()
            undo.callback(os.close, self._meeting)
            self._store = dist.TCPStore(
                LOOPBACK, self._port, None, True, OPERATION, wait_for_workers=False,
                master_listen_fd=listener.detach(),
            )  # fmt: skip
            self._reader = threading.Thread(
                target=self._read, args=(self._store.clone(),), name="comfy_xdit events", daemon=True
            )
            self._reader.start()
            undo.pop_all()

    def invitation(self, rank: int) -> Invitation:
        """What the process of `rank` must be told."""
        return Invitation(
            rank, len(self._inbound), self._port, self._secret, self._outbound.descriptor,
            self._inbound[rank].descriptor, self._meeting, self._host_pid, self._degrees,
            self._logs[rank] if self._logs else "",
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
        sealed = [self._signer.seal(route, self._sequence.next(route), head) for route in routes]
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
        """Seconds since the interpreter of `rank` last ran; 0 before the first time."""
        last = self._inbound[rank].heartbeat
        return time.monotonic() - last if last else 0.0

    def beats(self) -> tuple[int, ...]:
        """A number per rank that grows with its own work: commands, steps, answers."""
        return tuple(segment.beats for segment in self._inbound)

    def device_works(self, rank: int) -> bool:
        """Whether the GPU of `rank` had work to do when the rank last looked."""
        return self._inbound[rank].device_works

    def interrupt(self, job: int) -> None:
        """Ask the ranks to stop `job` at the next step boundary."""
        key = _interrupt(job)
        self._store.set(key, self._signer.stamp(key.encode()))

    def close(self) -> None:
        """End the reader and release memory and store. Call it when no rank is alive."""
        self._closing = True
        self._store.queue_push(EVENTS, b"")
        self._reader.join(CLOSE_SECONDS)
        for segment in (self._outbound, *self._inbound):
            segment.close()
        os.close(self._meeting)
        del self._store

    def _read(self, store: dist.Store) -> None:
        """Move events from the store to the inbox until `close`."""
        with Reported(self.inbox, "thread that reads the ranks' messages"):
            store.set_timeout(IDLE)
            while (sealed := store.queue_pop(EVENTS)) or not self._closing:
                try:
                    self.inbox.put(self._event(sealed))
                except Unsigned as fault:  # not of a rank: said aloud, and what the ranks say is still read
                    self.inbox.put(Event(-1, fault=fault))

    def _event(self, sealed: bytes) -> Event:
        """What a rank says. Raises WorkerDied for what none of this version would."""
        with _understood(EVENTS):
            head = self._signer.open(sealed)
            rank = self._routes.index(self._seen.check(head, self._routes))
            job, body, entries = _parts(head)
            tensors = self._inbound[rank].read(entries)
            self._inbound[rank].acknowledged = head["sequence"] + 1
            message = rebuild(body, tensors)
            if not isinstance(message, ANSWERS):
                raise ValueError(f"a rank says {type(message).__name__}")
            check_fields(message)
        return Event(rank, job, message, len(sealed) + sum(tensor.nbytes for tensor in tensors))


class Rank:
    """A rank's end of the bridge."""

    def __init__(self, invitation: Invitation):
        self.rank, self.world_size, self.log = invitation.rank, invitation.world_size, invitation.log
        self._store = dist.TCPStore(LOOPBACK, invitation.port, None, False, OPERATION)
        self._commands = self._store.clone()
        self._commands.set_timeout(IDLE)
        self._signer, self._sequence, self._seen = Signer(invitation.secret), Sequence(), Sequence()
        self._inbound, self._outbound = Segment(invitation.inbound), Segment(invitation.outbound)
        self._meeting = invitation.meeting
        self._preview_end, self._preview_sent = HEADER_BYTES, 0
        self.ask_device: Callable[[], bool] = lambda: False  # the program knows its device
        threading.Thread(target=self._show_life, daemon=True, name="heartbeat").start()

    def group_store(self) -> dist.Store:
        """Where the ranks meet to form their process group: a file that nobody else inherits.

        torch.distributed signs nothing, so its words do not go through the bridge's store.
        """
        return dist.PrefixStore("group", dist.FileStore(f"/proc/self/fd/{self._meeting}", self.world_size))

    def receive(self, device: torch.device | str) -> tuple[int, Callable[[], Any]]:
        """Wait for the next command: its job, and what gives the message, its tensors copied to `device`.

        They are two, as tensors for which the device has no memory are no end of the rank.

        Raises:
            WorkerDied: it is no command of this group's host; what gives the message raises it too.
        """
        route = f"commands/{self.rank}"
        sealed = self._commands.queue_pop(route)
        with _understood(route):
            head = self._signer.open(sealed)
            self._seen.check(head, (route,))
            self.beat()
            job, body, entries = _parts(head)

        def take() -> Any:
            with _understood(route):
                return rebuild(body, self._inbound.read(entries, device))

        return job, take

    def send(self, job: int, message: Any) -> None:
        """Give `message`, the last of `job`, to the host.

        It lies behind the region of previews, one of which the host may still be reading.

        Raises:
            TypeError, ValueError: it cannot cross the bridge; nothing was sent.
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

    def beat(self) -> None:
        """Show that the rank's own work goes on."""
        self._outbound.beats += 1

    def interrupted(self, job: int) -> bool:
        """True when the host asked to stop `job`. What another process wrote there is not the host's."""
        key = _interrupt(job)
        return self._store.check([key]) and hmac.compare_digest(
            self._store.get(key), self._signer.stamp(key.encode())
        )

    def _show_life(self) -> None:
        """Show that the interpreter runs, and what a look from outside does not see: the device."""
        while True:
            used = time.process_time()
            self._outbound.heartbeat = time.monotonic()
            time.sleep(HEARTBEAT_SECONDS)
            # A device is asked only while the process waits: a CUDA graph that is captured would break.
            waits = time.process_time() - used < IDLE_SHARE * HEARTBEAT_SECONDS
            self._outbound.device_works = waits and self.ask_device()

    def _push(self, job: int, message: Any, base: int) -> int:
        flat = flatten(message)
        entries = self._outbound.write(flat.tensors, base) if flat.tensors else []
        head = {"job": job, "body": flat.head, "tensors": entries}
        route = f"{EVENTS}/{self.rank}"
        sealed = self._signer.seal(route, self._sequence.next(route), head)
        number = self._sequence.take(route)
        self._store.queue_push(EVENTS, sealed)
        self.beat()
        return number


@contextmanager
def _understood(where: str) -> Iterator[None]:
    """Within, what is wrong with a message is an Unreadable."""
    try:
        yield
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"a message on {where} makes no sense: {error}") from error


def _parts(head: dict[str, Any]) -> tuple[int, Any, Any]:
    """Job, body and tensors of a head."""
    if not {"job", "body", "tensors"} <= head.keys() or type(head["job"]) is not int:
        raise ValueError("it is of no job, or has no body or no tensors")
    return head["job"], head["body"], head["tensors"]


def _interrupt(job: int) -> str:
    return f"interrupt/{job}"


def _check_room(world_size: int) -> None:
    """Raise OSError when descriptors or addresses are short: the store's library would end this process."""
    opened: list[int] = []
    try:
        for _ in range(DESCRIPTORS + world_size * RANK_DESCRIPTORS):
            opened.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
        mmap.mmap(-1, STACKS + world_size * RANK_STACKS).close()
    finally:
        for descriptor in opened:
            os.close(descriptor)
