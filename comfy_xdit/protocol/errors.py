"""What can go wrong, in the words a person reads on a node. Nothing else is raised on purpose."""

from __future__ import annotations

from typing import Any


def counted(number: int, noun: str) -> str:
    """1 device, 2 devices."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


class XDiTError(Exception):
    """Base of every error the pack raises on purpose; its text is meant for the person at the graph."""


class InvalidInput(XDiTError, ValueError):
    """A value the person can correct. The text names the value, the limit and the remedy."""


class NotInTheLoop(InvalidInput):
    """The ranks' own sampling loop cannot run this. Calls of the transformer, one by one, still can."""


class RemoteError(XDiTError, RuntimeError):
    """A rank raised: carries the rank, the type, the message and the rank's full traceback.

    The traceback is for the rank's log, and for whoever reports the error: in the text it would bury it.
    """

    remedy = (
        "Press Run again; if it comes back, report it with the logs of the ranks: they hold the traceback."
    )

    def __init__(self, rank: int, kind: str, message: str, traceback: str):
        super().__init__(f"rank {rank}: {kind}: {message}\n{self.remedy}")
        self.rank, self.kind, self.message, self.traceback = rank, kind, message, traceback

    @property
    def out_of_memory(self) -> bool:
        """Whether the rank's device had no memory left: PyTorch's words on a GPU and on CPU."""
        words = ("out of memory", "can't allocate memory")
        kinds = ("OutOfMemoryError", "MemoryError")
        return self.kind in kinds or any(word in self.message.lower() for word in words)


class OutOfDeviceMemory(RemoteError):
    """A rank's device had no memory left. The text says what needs less."""

    remedy = (
        "The rank's device has no memory left for this. What needs less: shard_weights or "
        "pipefusion_degree 2 in xDiT Parallel Config (each rank then keeps a part of the model), "
        "more ranks (ulysses_degree), a smaller picture or batch, tiles in xDiT VAE Decode."
    )

    @classmethod
    def of(cls, error: RemoteError) -> OutOfDeviceMemory:
        """The same with the remedy."""
        return cls(error.rank, error.kind, error.message, error.traceback)


class WorkerDied(XDiTError, RuntimeError):
    """A rank's process ended or stopped answering. The next call starts a new group."""


class DeviceInUse(XDiTError, RuntimeError):
    """Another program's ranks compute on a device. The text names the program and the remedy."""


class Interrupted(XDiTError):
    """The run was cancelled by the person; the ranks stopped at a step boundary and stay warm."""


def shown(value: Any, most: int = 60) -> str:
    """What somebody else has written, for an error: on one line, and short."""
    text = ascii(value)
    return text if len(text) <= most else f"{text[:most]}..."
