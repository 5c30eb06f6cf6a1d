"""GPUs in use by ranks, told to the other programs of this user, so that two never fill one memory.

One lock per GPU. Locks are POSIX's, of a process: the kernel ends them with the process, however that
ends, and a child does not inherit them. Within a process the registry sees to it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from comfy_xdit.protocol.errors import DeviceInUse
from comfy_xdit.protocol.remembered import cache_folder
from comfy_xdit.ranks.environment import VISIBLE, visible

SHARE = "XDIT_SHARE_DEVICES"  # environment: 1 neither claims devices nor respects claims
COMMAND_CHARACTERS = 200
CONTENT_BYTES = 4096
_log = logging.getLogger(__name__)


@dataclass
class _Lock:
    """A lock of this process, and how many claims need it."""

    descriptor: int
    claims: int = 0


_locks: dict[Path, _Lock] = {}
_guard = threading.Lock()


class Claim:
    """`devices` are this process's until `release`.

    Raises:
        DeviceInUse: another program has one of them.
    """

    def __init__(self, devices: Sequence[str]):
        self._files: list[Path] = []
        if os.environ.get(SHARE) == "1":
            return
        with _guard:
            try:
                for device, name in exclusive(devices).items():
                    self._take(device, cache_folder() / "devices" / f"{name}.lock")
            except BaseException:
                self._let_go()
                raise

    def release(self) -> None:
        """Let others have them."""
        with _guard:
            self._let_go()

    def _take(self, device: str, file: Path) -> None:
        # Opened once in a process: closing any descriptor of a file ends the process's locks of it.
        if file not in _locks:
            try:
                _locks[file] = _Lock(_locked(device, file))
            except OSError as error:
                _log.warning("comfy_xdit: other programs cannot be told that %s is in use: %s", device, error)
                return
        _locks[file].claims += 1
        self._files.append(file)

    def _let_go(self) -> None:
        for file in self._files:
            _locks[file].claims -= 1
            if not _locks[file].claims:
                descriptor = _locks.pop(file).descriptor
                with contextlib.suppress(OSError):  # a disk that is full or gone: the lock ends all the same
                    os.ftruncate(descriptor, 0)
                os.close(descriptor)
        self._files = []


def exclusive(devices: Sequence[str]) -> dict[str, str]:
    """What to call each device that one group of ranks needs for itself: the same in every program.

    "cuda:0" is another GPU in a program with another CUDA_VISIBLE_DEVICES. CPU ranks share.
    """
    return {device: _name(device) for device in devices if device.startswith("cuda:")}


def _name(device: str) -> str:
    import torch

    number = visible(device, os.environ.get(VISIBLE))
    if not number.startswith("MIG-") and torch.cuda.is_available():
        number = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    return re.sub(r"[^\w.-]", "_", number)


def _locked(device: str, file: Path) -> int:
    """A descriptor of the locked file, with who has locked it in it."""
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        own = {"pid": os.getpid(), "command": " ".join(sys.orig_argv)[:COMMAND_CHARACTERS]}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(own | {"since": time.strftime("%F %T")}).encode(), 0)
    except (BlockingIOError, PermissionError):  # either, by POSIX
        holder = _told(os.pread(descriptor, CONTENT_BYTES, 0))
        os.close(descriptor)
        raise DeviceInUse(
            f"{device} is in use by the ranks of another program: {holder}. Two groups of ranks would fill "
            "its memory. End that program, choose other devices in xDiT Parallel Config, or set "
            f"{SHARE}=1 before this program starts to share on purpose."
        ) from None
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _told(content: bytes) -> str:
    """Who holds a lock, in words."""
    try:
        told = json.loads(content)
        return f"pid {told['pid']} ({told['command']}), since {told['since']}"
    except (ValueError, KeyError, TypeError):  # it has just taken the lock
        return "it does not say which"
