"""A host in a process of its own, and what is left when it has ended."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any

import psutil

from tests.waiting import ends_within

SECONDS = 240.0  # for anything it says, on a busy machine
ROOT = Path(__file__).parent.parent.parent
SHELL = 'exec "$@" <&- >&- 2>&-'


class HostProcess:
    """`python -m benchmarks.faults.host` with a folder for temporary files of its own.

    Args:
        folder: models and what is to be drawn of them.
        closed: without standard input, output and error.
    """

    def __init__(self, folder: Path, closed: bool = False):
        self.temporary = Path(tempfile.mkdtemp(prefix="host_"))
        own, given = os.pipe(), os.pipe()
        command = [sys.executable, "-m", "benchmarks.faults.host", str(folder), str(own[0]), str(given[1])]
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close
        self._process = subprocess.Popen(
            ["sh", "-c", SHELL, "sh", *command] if closed else command,
            stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log,
            cwd=ROOT, pass_fds=(own[0], given[1]), env=os.environ | {"TMPDIR": str(self.temporary)},
        )  # fmt: skip
        os.close(own[0])
        os.close(given[1])
        self._commands, self._reports = own[1], os.fdopen(given[0], "rb", buffering=0)
        self._children: list[int] = []

    @property
    def pid(self) -> int:
        """Of the host."""
        return self._process.pid

    def report(self) -> dict[str, Any]:
        """The next thing it says.

        Raises:
            RuntimeError: it ended, or said nothing in time.
        """
        if select.select([self._reports], [], [], SECONDS)[0] and (line := self._reports.readline()):
            return json.loads(line)
        raise RuntimeError(f"the host says nothing:\n{self._errors()[-2000:]}")

    def tell(self, word: str) -> None:
        """Have it do something; remembers what processes it has by then."""
        self._children = [child.pid for child in psutil.Process(self.pid).children(recursive=True)]
        os.write(self._commands, word.encode())

    def ended(self, ranks: list[int]) -> tuple[float, list[str]]:
        """Seconds until all its processes were gone, and what was left after all."""
        began, left = time.monotonic(), []
        for pid in dict.fromkeys([*ranks, *self._children]):
            if not ends_within(pid, 10.0):
                left.append(f"process {pid}")
        seconds = time.monotonic() - began
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        left += [f"file {entry.name}" for entry in self.temporary.iterdir()]
        return seconds, left

    def close(self) -> None:
        """End it, and remove what it had."""
        self._process.kill()
        self._process.wait()
        os.close(self._commands)
        self._reports.close()
        self._log.close()
        shutil.rmtree(self.temporary)

    def _errors(self) -> str:
        self._log.seek(0)
        return self._log.read().decode(errors="replace")
