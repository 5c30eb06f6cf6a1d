"""`make restarts COMFYUI_DIR=...`: a real ComfyUI server that is ended in mid-run, and what is left of it.

Run by the Python of that ComfyUI's environment. The servers have one folder after each other, as restarts of
one installation have.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import copy
import io
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from benchmarks.faults import page
from benchmarks.faults.leftovers import SHARED
from comfy_xdit.protocol.spec import comfyui_version
from comfy_xdit.ranks.environment import ROOT
from tests.comfyui.server import Client, Run, Server

WORKFLOWS = ("demo.json", "demo_ksampler.json")
LAYOUT, SAMPLER = "1", "3"  # their ids in them
STEPS, LONG = 4, 3000  # of a run that ends, and of one that is met in mid-run
SEED = 7
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGHUP, signal.SIGKILL, signal.SIGINT)
AT_STEPS = 30  # the server ends within so many
GONE_SECONDS = 3.0  # in which what it had must be gone, after itself
POLL_SECONDS = 0.02
ORDERLY_SECONDS = 15.0  # for a server that is asked to end


class Ended(Exception):
    """The server was ended on purpose."""


@dataclass(frozen=True)
class Life:
    """Of one server: how it ended, seconds from its start until it was ready, and from its end until all was
    gone, and what is wrong.
    """

    how: str
    ready: float
    gone: float
    wrong: tuple[str, ...]


def prompt(name: str, steps: int) -> dict[str, Any]:
    """A shipped workflow with so many steps."""
    changed = copy.deepcopy(json.loads((ROOT / "workflows" / "api" / name).read_text()))
    changed[SAMPLER]["inputs"] |= {"steps": steps, "seed": SEED}
    changed[LAYOUT]["inputs"] |= {"strategy": "manual", "ulysses_degree": 2}
    return changed


def drawn(server: Server, run: Run) -> np.ndarray:
    """The pixels of a run that came to its end."""
    (files,) = (data["output"]["images"] for _, kind, data in run.messages if kind == "executed")
    file = server.base / "output" / files[0]["subfolder"] / files[0]["filename"]
    with Image.open(io.BytesIO(file.read_bytes())) as picture:
        return np.asarray(picture.convert("RGB"))


async def draw_and_end(server: Server, name: str, at_step: int, end: Callable[[], None]) -> np.ndarray:
    """The pixels of a picture; then `end` is called in the middle of a long run."""

    async def after_steps(_client: Client, kind: str, data: dict[str, Any]) -> None:
        if kind == "progress" and data["value"] >= at_step:
            end()
            raise Ended

    async with Client(server) as client:
        run = await client.run(prompt(name, STEPS))
        if run.end != "execution_success":
            raise AssertionError(f"{name} fails: {run.outcome}")
        pixels = drawn(server, run)
        with contextlib.suppress(Ended):
            run = await client.run(prompt(name, LONG), after_steps)
            raise AssertionError(f"the long run ends by itself: {run.outcome}")
    return pixels


class Belongings:
    """What a running server has: processes and listening sockets; and files that are there before it."""

    def __init__(self, folders: list[Path]):
        self._folders = folders
        self._files = self._now()
        self._processes: list[psutil.Process] = []
        self._ports: set[int] = set()

    def look(self, pid: int) -> None:
        """Note what the server has now."""
        host = psutil.Process(pid)
        self._processes = [host, *host.children(recursive=True)]
        for process in self._processes:
            connections = process.net_connections("inet")
            self._ports |= {c.laddr.port for c in connections if c.status == psutil.CONN_LISTEN}

    def left(self) -> list[str]:
        """What of it is still there."""
        found = [f"process {process.pid}" for process in self._processes if not _has_ended(process)]
        found += [
            f"port {c.laddr.port}"
            for c in psutil.net_connections("inet")
            if c.status == psutil.CONN_LISTEN and c.laddr.port in self._ports
        ]
        return found + [f"file {name}" for name in (self._now() - self._files)]

    def _now(self) -> Counter[str]:
        return Counter(str(entry) for folder in self._folders for entry in folder.iterdir())


def _has_ended(process: psutil.Process) -> bool:
    """True also for one whose new parent has not yet asked how it ended."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE or not process.is_running()
    except psutil.NoSuchProcess:
        return True


def life(comfyui: Path, base: Path, number: int, expected: dict[str, np.ndarray]) -> Life:
    """One server, from its start until all of it is gone.

    Args:
        expected: the pictures of workflows, which the first one of each gives.
    """
    name, how = WORKFLOWS[number % len(WORKFLOWS)], SIGNALS[number % len(SIGNALS)]
    belongings = Belongings([Path(tempfile.gettempdir()), SHARED])
    began, server = time.monotonic(), Server(comfyui, base)

    moments = []

    def end() -> None:
        belongings.look(server.process.pid)
        server.process.send_signal(how)
        moments.append(time.monotonic())

    try:
        server.wait_until_ready()
        ready = time.monotonic() - began
        pixels = asyncio.run(draw_and_end(server, name, random.Random(number).randrange(1, AT_STEPS), end))
        wrong = [] if np.array_equal(expected.setdefault(name, pixels), pixels) else ["another picture"]
        try:
            server.process.wait(ORDERLY_SECONDS)
        except subprocess.TimeoutExpired:
            wrong.append(f"it does not end within {ORDERLY_SECONDS:.0f} s")
        ended = time.monotonic()
        while (left := belongings.left()) and time.monotonic() < ended + GONE_SECONDS:
            time.sleep(POLL_SECONDS)
        gone = time.monotonic() - moments[0]
        if how != signal.SIGINT and "Traceback" in (said := server.log()):
            wrong.append(f"its log: {said[said.index('Traceback') :][:500]}")
        return Life(how.name, ready, gone, (*wrong, *left))
    finally:
        server.close()


def rows(lives: list[Life]) -> list[dict[str, Any]]:
    """By the way they ended."""
    found = []
    for how in dict.fromkeys(one.how for one in lives):
        of_it = [one for one in lives if one.how == how]
        found.append({
            "how": how, "times": len(of_it), "ready": max(one.ready for one in of_it),
            "gone": max(one.gone for one in of_it), "left": [what for one in of_it for what in one.wrong],
        })  # fmt: skip
    return found


def main() -> None:
    """Start, end, look, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("comfyui", type=Path)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--no-page", action="store_true")
    arguments = parser.parse_args()
    began, lives = time.monotonic(), []
    expected: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory(prefix="comfy_xdit_restarts_") as root:
        base, temporary = Path(root, "base"), Path(root, "temporary")
        temporary.mkdir()
        os.environ["TMPDIR"] = tempfile.tempdir = str(temporary)
        for number in range(arguments.runs):
            lives.append(one := life(arguments.comfyui.resolve(), base, number, expected))
            print(f"{number + 1}: {one.how}, ready in {one.ready:.0f} s, gone in {one.gone:.2f} s", end="")
            print("", *one.wrong, sep="\n    ", flush=True)
    bad = sum(bool(one.wrong) for one in lives)
    version = comfyui_version(arguments.comfyui)
    words = (
        f"{len(lives)} servers of ComfyUI {version} in {(time.monotonic() - began) / 60:.0f} minutes, "
        f"{bad} left something, or drew another picture."
    )
    print(words)
    if not arguments.no_page:
        page.write("restarts", {"words": words, "rows": rows(lives)})
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
