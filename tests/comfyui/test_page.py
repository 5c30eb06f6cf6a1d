"""ComfyUI's page in Chromium with the pack in it. Runs where playwright has one (CI)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.comfyui.server import Server

playwright = pytest.importorskip("playwright.sync_api")
READY_MS = 120_000
NODES = """() => {
  const registered = Object.keys(window.LiteGraph?.registered_node_types ?? {});
  return registered.filter((name) => name.startsWith("XDiT"));
}"""


def test_the_page_knows_the_packs_nodes_and_reports_no_error_of_it(tmp_path):
    server, errors = Server(Path(os.environ["COMFYUI_DIR"]), tmp_path), []
    try:
        server.wait_until_ready()
        with playwright.sync_playwright() as running:
            browser = running.chromium.launch()
            page = browser.new_page()
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.goto(server.url)
            page.wait_for_function(f"({NODES})().length > 0", timeout=READY_MS)
            nodes = page.evaluate(NODES)
            i18n = page.request.get(f"{server.url}/i18n").json()
            blueprints = page.request.get(f"{server.url}/global_subgraphs").json()
            browser.close()
    finally:
        server.close()
    assert {"XDiTParallelConfig", "XDiTLoadDiffusionModel", "XDiTSampler", "XDiTStatus"} <= set(nodes)
    assert not [error for error in errors if "xdit" in error.lower()]
    assert "XDiTSampler" in i18n["en"]["nodeDefs"] and "XDiTSampler" in i18n["zh"]["nodeDefs"]
    assert any("xDiT" in blueprint["name"] for blueprint in blueprints.values())
