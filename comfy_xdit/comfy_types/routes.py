"""What this pack answers on ComfyUI's own server. Read only, and to pages of the server's own origin."""

from __future__ import annotations

import asyncio
from typing import Any
from urllib.parse import urlsplit

from aiohttp import web

from comfy_xdit.comfy_types.beginning import self_check
from comfy_xdit.nodes.report import status, words

STATUS = "/xdit/status"


def add_routes() -> None:
    """Answer on the server of this process, where there is one; a test may import ComfyUI without."""
    from server import PromptServer

    running = getattr(PromptServer, "instance", None)
    if running is not None:
        add_to(running.routes)


def add_to(routes: web.RouteTableDef) -> None:
    """Answer there, once: two copies of the pack in one ComfyUI would keep its server from starting."""
    if not any(getattr(route, "path", None) == STATUS for route in routes):
        routes.get(STATUS)(answer)


async def answer(request: web.Request) -> web.Response:
    """What runs in the ranks, as JSON; ranks that work are not asked, so that nobody waits for a picture."""
    if not own_origin(request.headers.get("Origin"), request.headers.get("Sec-Fetch-Site"), request.host):
        return web.json_response({"error": "another page's request; open ComfyUI's own page"}, status=403)
    return web.json_response(await asyncio.to_thread(_told))


def _told() -> dict[str, Any]:
    told = status(self_check(), wait=False)
    return told | {"report": words(told)}


def own_origin(origin: str | None, site: str | None, host: str) -> bool:
    """Whether a request comes from a page of this server, or from no page (commands send no such header)."""
    if site not in (None, "same-origin", "none"):
        return False
    return origin is None or urlsplit(origin).netloc.lower() == host.lower()
