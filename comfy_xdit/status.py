"""`status`: what runs in the ranks of a ComfyUI, asked over its own server."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

from comfy_xdit.protocol.errors import InvalidInput

URL = "http://127.0.0.1:8188"  # where ComfyUI listens unless told otherwise
PATH, QUEUE = "/xdit/status", "/queue"
SECONDS = 10.0
MOST = 16 << 20  # bytes of an answer
# Straight to it: a proxy that the environment names has nothing to do with a server of one's own.
_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


def asked(url: str = URL) -> dict[str, Any]:
    """What the ComfyUI at `url` says of its ranks, and under "queue" how many prompts run and wait.

    Raises:
        InvalidInput: no ComfyUI with this pack answers there.
    """
    told, queue = _get(url, PATH), _get(url, QUEUE)
    return told | {"queue": {"running": len(queue["queue_running"]), "waiting": len(queue["queue_pending"])}}


def _get(url: str, path: str) -> dict[str, Any]:
    if not url.startswith(("http://", "https://")):
        raise InvalidInput(f"{url!r} is no address of a ComfyUI; write it as {URL}.")
    try:
        with _open(url.rstrip("/") + path, timeout=SECONDS) as response:
            return json.loads(response.read(MOST))
    except urllib.error.HTTPError as error:
        raise InvalidInput(
            f"the server at {url} answers {path} with {error.code}: it is no ComfyUI, or its comfy_xdit is "
            "missing or older; see ComfyUI's log, or name another server with --url."
        ) from error
    except (OSError, ValueError) as error:
        why = getattr(error, "reason", error)
        raise InvalidInput(
            f"no ComfyUI answers at {url} ({why}); start it, or name where it listens with --url."
        ) from error


def words(told: dict[str, Any]) -> str:
    """The same for a person."""
    queue = told["queue"]
    return f"{queue['running']} running, {queue['waiting']} waiting in the queue\n{told['report']}"
