"""A ComfyUI server of its own for tests, and a client that queues prompts and reads what happens."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from comfy_xdit.ranks.environment import ROOT
from tests.comfyui.inputs import python_path

START_SECONDS = 180.0
SILENCE_SECONDS = 120.0
POLL_SECONDS = 0.2
ENDS = ("execution_success", "execution_error", "execution_interrupted")

OnMessage = Callable[["Client", str, dict[str, Any]], Awaitable[None]]


class Server:
    """`main.py` of a ComfyUI checkout on a free loopback port, with folders of its own in `base`.

    Of one that has ended before they are used again.
    """

    def __init__(self, comfyui: Path, base: Path):
        (base / "custom_nodes").mkdir(parents=True, exist_ok=True)
        if not (pack := base / "custom_nodes" / "comfy_xdit").is_symlink():
            pack.symlink_to(ROOT, target_is_directory=True)
        self.base, self.port, self._log = base, _free_port(), base / "log.txt"
        arguments = {
            "--base-directory": base,
            "--database-url": f"sqlite:///{base / 'comfyui.db'}",
            "--port": self.port,
            "--listen": "127.0.0.1",
            "--preview-method": "latent2rgb",
        }
        words = [str(word) for pair in arguments.items() for word in pair]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(comfyui / "main.py"), "--cpu", "--disable-api-nodes", *words],
                cwd=base,
                env={**os.environ, "PYTHONPATH": python_path()},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def wait_until_ready(self) -> None:
        """Return when it answers; raise with its log if it ends or takes too long."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"{self.url}/system_stats", timeout=5):
                    return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                try:
                    self.process.wait(POLL_SECONDS)
                except subprocess.TimeoutExpired:
                    continue
                break
        raise AssertionError(f"the server did not start; its log:\n{self.log()}")

    def ranks(self) -> list[int]:
        """Process ids of the worker ranks it has started."""
        children = psutil.Process(self.process.pid).children()
        return [child.pid for child in children if child.name().startswith("xdit rank")]

    def get(self, path: str) -> bytes:
        """The body of a GET request; raises for anything but a success."""
        with urllib.request.urlopen(self.url + path, timeout=10) as response:
            return response.read()

    def log(self) -> str:
        """What it has printed."""
        return self._log.read_text(errors="replace")

    def close(self) -> None:
        """Ask it to stop, then make it."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


@dataclass
class Run:
    """What happened to one prompt: (type, data) of every message with the time it came."""

    prompt_id: str
    messages: list[tuple[float, str, dict[str, Any]]] = field(default_factory=list)
    previews: int = 0

    @property
    def end(self) -> str:
        """The message that ended it, one of ENDS."""
        return self.messages[-1][1]

    @property
    def outcome(self) -> dict[str, Any]:
        """The data of that message."""
        return self.messages[-1][2]

    @property
    def ended_at(self) -> float:
        """time.monotonic() of that message."""
        return self.messages[-1][0]

    def progress(self, node: str) -> list[tuple[int, int]]:
        """(step, steps) that were reported for a node."""
        return [(data["value"], data["max"]) for _, data in self._progress(node)]

    def progress_times(self, node: str) -> list[float]:
        """time.monotonic() of each of them."""
        return [at for at, _ in self._progress(node)]

    def _progress(self, node: str) -> list[tuple[float, dict[str, Any]]]:
        return [(at, data) for at, kind, data in self.messages if kind == "progress" and data["node"] == node]


class Client:
    """Queues prompts over HTTP and follows them on the websocket."""

    def __init__(self, server: Server):
        self._server, self._id = server, uuid.uuid4().hex

    async def __aenter__(self) -> Client:
        self._session = aiohttp.ClientSession()
        self._socket = await self._session.ws_connect(
            f"{self._server.url}/ws?clientId={self._id}",
            max_msg_size=0,
            timeout=aiohttp.ClientWSTimeout(ws_receive=SILENCE_SECONDS),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._socket.close()
        await self._session.close()

    async def interrupt(self) -> None:
        """What the cancel button does."""
        async with self._session.post(f"{self._server.url}/interrupt", json={}) as response:
            response.raise_for_status()

    async def run(self, prompt: dict[str, Any], on_message: OnMessage | None = None) -> Run:
        """Queue a prompt in API format and follow it to its end."""
        body = {"prompt": prompt, "client_id": self._id}
        async with self._session.post(f"{self._server.url}/prompt", json=body) as response:
            answer = await response.json()
            assert response.status == 200, answer
        run = Run(answer["prompt_id"])
        while not run.messages or run.end not in ENDS:
            message = await self._socket.receive()
            assert message.type in (aiohttp.WSMsgType.TEXT, aiohttp.WSMsgType.BINARY), self._server.log()
            if message.type == aiohttp.WSMsgType.BINARY:
                run.previews += 1
                continue
            content = json.loads(message.data)
            if content["data"].get("prompt_id") != run.prompt_id:
                continue
            run.messages.append((time.monotonic(), content["type"], content["data"]))
            if on_message is not None:
                await on_message(self, content["type"], content["data"])
        return run


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
