"""What the pack answers on ComfyUI's server, and to whom."""

from __future__ import annotations

import asyncio
import json

import pytest


@pytest.mark.parametrize(
    ("origin", "site", "own"),
    [
        (None, None, True),
        ("http://127.0.0.1:8188", "same-origin", True),
        (None, "none", True),
        ("http://elsewhere.example", None, False),
        (None, "cross-site", False),
        ("http://127.0.0.1:9999", "same-site", False),
        ("null", None, False),
    ],
)
def test_pages_of_another_origin_get_nothing(comfyui, origin, site, own):
    from aiohttp.test_utils import make_mocked_request

    from comfy_xdit.comfy_types import routes

    headers = {"Host": "127.0.0.1:8188", "Origin": origin, "Sec-Fetch-Site": site}
    request = make_mocked_request("GET", routes.STATUS, {k: v for k, v in headers.items() if v is not None})
    response = asyncio.run(routes.answer(request))
    assert response.status == (200 if own else 403)
    assert ("groups" in json.loads(response.text)) is own


def test_two_copies_of_the_pack_answer_once(comfyui):
    from aiohttp import web

    from comfy_xdit.comfy_types import routes

    table = web.RouteTableDef()
    routes.add_to(table)
    routes.add_to(table)
    assert [route.path for route in table] == [routes.STATUS]
