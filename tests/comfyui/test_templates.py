"""A workflow of ComfyUI's own template set, with only its loader node swapped.

The demo model stands in for SD3.5: its size and its prompt are set, nothing else of the graph is.
"""

import asyncio
import copy
import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from comfy_xdit.headless.format import api_of
from tests.comfyui.inputs import DEMO
from tests.comfyui.server import Client, Server

TEMPLATE = "sd3.5_simple_example.json"
PROMPT = "a large yellow square on the right on a black background"
SIDE = 128  # pixels, as the demo model draws
# Latents that differ by less than 1e-4 of their size may round a pixel the other way.
PIXEL_LEVELS = 1


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if not (DEMO / "pipeline").is_dir():
        pytest.skip("no demo model")
    base = tmp_path_factory.mktemp("templates")
    (base / "models" / "diffusion_models").mkdir(parents=True)
    (base / "models" / "diffusion_models" / "stand_in.safetensors").symlink_to(DEMO / "demo_sd3.safetensors")
    running = Server(Path(os.environ["COMFYUI_DIR"]), base)
    try:
        running.wait_until_ready()
        yield running
    finally:
        running.close()


@pytest.fixture
def template(comfyui: SimpleNamespace) -> dict[str, Any]:
    """The template as the front end would queue it."""
    folders = [Path(origin).parent for origin in _template_packages()]
    files = [file for folder in folders for file in folder.glob(f"**/{TEMPLATE}")]
    if not files:
        pytest.skip("ComfyUI's workflow templates are not installed")
    return api_of(json.loads(files[0].read_text()), comfyui.mappings)


def _template_packages() -> list[str]:
    names = ("comfyui_workflow_templates", "comfyui_workflow_templates_media_other")
    return [spec.origin for name in names if (spec := importlib.util.find_spec(name)) and spec.origin]


def _only(graph: dict[str, Any], kind: str) -> str:
    (name,) = (name for name, node in graph.items() if node["class_type"] == kind)
    return name


def _draw(server: Server, graph: dict[str, Any]) -> np.ndarray:
    async def follow() -> Any:
        async with Client(server) as client:
            return await client.run(graph)

    run = asyncio.run(follow())
    assert run.end == "execution_success", run.outcome
    (image,) = (
        data["output"]["images"][0]
        for _, kind, data in run.messages
        if kind == "executed" and (data["output"] or {}).get("images")
    )
    return np.asarray(Image.open(server.base / "output" / image["subfolder"] / image["filename"]))


def test_a_template_runs_with_only_its_loader_swapped(server, template):
    loader, sampler = _only(template, "CheckpointLoaderSimple"), _only(template, "KSampler")
    size = _only(template, "EmptySD3LatentImage")
    template[size]["inputs"] |= {"width": SIDE, "height": SIDE}
    template[template[sampler]["inputs"]["positive"][0]]["inputs"]["text"] = PROMPT
    pipeline = {"pipeline": "demo (comfy_xdit)", "weight_dtype": "default"}
    template[loader] = {"class_type": "XDiTLoadPipeline", "inputs": pipeline}
    stock = copy.deepcopy(template)
    stock["99"] = {
        "class_type": "UNETLoader",
        "inputs": {"unet_name": "stand_in.safetensors", "weight_dtype": "default"},
    }
    stock[sampler]["inputs"]["model"] = ["99", 0]

    ours, expected = _draw(server, template), _draw(server, stock)

    assert ours.shape == expected.shape == (SIDE, SIDE, 3)
    assert expected.std() > 10  # a picture, not one colour
    assert np.abs(ours.astype(int) - expected.astype(int)).max() <= PIXEL_LEVELS
    assert server.ranks()
