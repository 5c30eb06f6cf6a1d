"""A ComfyUI in this process, with the pack loaded as ComfyUI loads it, and tiny models to run."""

from __future__ import annotations

import asyncio
import importlib
import os
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from comfy_xdit.ranks.environment import ROOT, rank_threads
from tests import tiny
from tests.comfyui.inputs import DEMO, FLUX_CONFIG, LAYOUTS, SHIM, python_path
from worker.models.flux.family import Flux

HERE = Path(__file__).parent
COMFYUI_DIR = os.environ.get("COMFYUI_DIR")
# Stock nodes outside ComfyUI's nodes.py; a version that lacks one has no node to test.
EXTRAS = (
    "advanced_samplers", "apg", "attention_multiply", "cfg", "context_windows", "controlnet",
    "custom_sampler", "differential_diffusion", "easycache", "edit_model", "eps", "flux", "freelunch",
    "fresca", "hooks", "hypertile", "ip2p", "lora_extract", "mahiro", "model_advanced", "model_merging",
    "pag", "perpneg", "rope", "sag", "sd3", "slg", "tcfg", "tomesd", "torch_compile",
)  # fmt: skip
# Everything the stock code of ComfyUI and its libraries warns about is theirs to mend.
pytestmark_all = [pytest.mark.comfyui, pytest.mark.filterwarnings("default")]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder, and skip them where there is no ComfyUI."""
    for item in items:
        if HERE in item.path.parents:
            for mark in pytestmark_all:
                item.add_marker(mark)
            if COMFYUI_DIR is None:
                item.add_marker(pytest.mark.skip(reason="COMFYUI_DIR names no ComfyUI checkout"))


@pytest.fixture(scope="session")
def comfyui(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """ComfyUI's modules in this process, on CPU, with models of its own and the pack loaded."""
    runpy.run_path(str(SHIM / "sitecustomize.py"))
    os.environ["PYTHONPATH"] = python_path()  # for the ranks
    # pytest puts the pack's parent here, where a folder named `comfy` would hide ComfyUI's.
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT.parent]
    # First, as in ComfyUI itself: the pack and ComfyUI both have a `nodes`, a `tests` ...
    sys.path.insert(0, COMFYUI_DIR)
    cli_args = importlib.import_module("comfy.cli_args")
    cli_args.args.cpu = True
    folder_paths = importlib.import_module("folder_paths")
    models = tmp_path_factory.mktemp("models")
    for kind in ("checkpoints", "controlnet", "diffusion_models", "diffusers", "loras", "vae"):
        (models / kind).mkdir()
        folder_paths.add_model_folder_path(kind, str(models / kind))
    nodes = importlib.import_module("nodes")
    extras = [Path(COMFYUI_DIR, "comfy_extras", f"nodes_{name}.py") for name in EXTRAS]
    with torch.inference_mode():
        for path in (*filter(Path.is_file, extras), ROOT):
            assert asyncio.run(nodes.load_custom_node(str(path))), f"ComfyUI could not load {path}"
        yield SimpleNamespace(nodes=nodes, models=models, mappings=nodes.NODE_CLASS_MAPPINGS)
    from comfy_xdit.ranks.registry import running_groups

    for group in running_groups():
        group.close()


@pytest.fixture
def run_node(comfyui: SimpleNamespace) -> Any:
    """run_node("KSampler", seed=1, ...) -> the outputs of a node, with the graph's inference mode."""

    def run(name: str, **inputs: Any) -> tuple[Any, ...]:
        node = comfyui.mappings[name]
        with torch.inference_mode():
            outputs = getattr(node(), node.FUNCTION)(**inputs)
        return getattr(outputs, "args", outputs)  # nodes of ComfyUI's newer kind wrap them

    return run


@pytest.fixture(scope="module")
def threads_of_a_rank() -> Iterator[None]:
    """As many here as a rank has: sums are in another order with another number."""
    before = torch.get_num_threads()
    torch.set_num_threads(rank_threads(1))
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def checkpoints(comfyui: SimpleNamespace) -> Iterator[Path]:
    """The folder for them; within, ComfyUI's text encoders are as small as those of the tiny files."""
    from tests.comfyui.tiny_checkpoints import small_text_encoders

    with small_text_encoders():
        yield comfyui.models / "checkpoints"


# Of module scope, so that the tests of one layout run together: another layout is other processes.
@pytest.fixture(params=LAYOUTS, scope="module")
def layout_name(request: pytest.FixtureRequest) -> str:
    """Each layout the tests of this folder compare on."""
    return request.param


@pytest.fixture(scope="module")
def degrees(layout_name: str) -> dict[str, int]:
    """Its degrees."""
    return LAYOUTS[layout_name]


@pytest.fixture(scope="session")
def tiny_sd3(comfyui: SimpleNamespace) -> str:
    """An SD3 file with random weights where every layer matters; its name for the loaders."""
    from worker.models.sd3.family import SD3

    # ComfyUI takes the width for 64 times the number of layers.
    config = {**tiny.SD3_CONFIG, "num_layers": tiny.SD3_CONFIG["num_attention_heads"]}
    module = tiny.build(SD3(), config)
    name = "tiny_sd3.safetensors"
    with torch.inference_mode(False):
        tiny.write_native(SD3(), module, config, comfyui.models / "diffusion_models" / name)
    return name


@pytest.fixture(scope="session")
def tiny_sd3_diffusers(comfyui: SimpleNamespace, tiny_sd3: str) -> str:
    """The same weights under diffusers' names."""
    from worker.models.sd3.family import SD3

    config = {**tiny.SD3_CONFIG, "num_layers": tiny.SD3_CONFIG["num_attention_heads"]}
    name = "tiny_sd3_diffusers.safetensors"
    with torch.inference_mode(False):
        tensors = {k: v.contiguous() for k, v in tiny.build(SD3(), config).state_dict().items()}
        save_file(tensors, comfyui.models / "diffusion_models" / name)
    return name


@pytest.fixture(scope="session")
def tiny_flux(comfyui: SimpleNamespace) -> Iterator[str]:
    """A Flux file with random weights, of a width ComfyUI is told; its name for the loaders.

    ComfyUI takes Flux's widths from FLUX.1 instead of the file. Stock loader and twin see the same.
    """
    from worker.models.flux.family import Flux

    detection = importlib.import_module("comfy.model_detection")
    original = detection.detect_unet_config

    def detect(state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> Any:
        config = original(state_dict, prefix, *args, **kwargs)
        first = state_dict.get(f"{prefix}img_in.weight")
        if config and config.get("image_model") == "flux" and first.shape[0] == tiny.FLUX_HIDDEN:
            config |= {
                "hidden_size": tiny.FLUX_HIDDEN,
                "num_heads": tiny.FLUX_CONFIG["num_attention_heads"],
                "axes_dim": list(tiny.FLUX_CONFIG["axes_dims_rope"]),
                "context_in_dim": tiny.FLUX_CONFIG["joint_attention_dim"],
                "vec_in_dim": tiny.FLUX_CONFIG["pooled_projection_dim"],
            }
        return config

    detection.detect_unet_config = detect
    name = "tiny_flux.safetensors"
    with torch.inference_mode(False):
        module = tiny.build(Flux(), tiny.FLUX_CONFIG)
        tiny.write_native(Flux(), module, tiny.FLUX_CONFIG, comfyui.models / "diffusion_models" / name)
    yield name
    detection.detect_unet_config = original


@pytest.fixture(scope="session")
def demo_sd3(comfyui: SimpleNamespace) -> str:
    """The demo's single file, as a stock loader finds it too; its name for the loaders."""
    source = DEMO / "demo_sd3.safetensors"
    if not source.is_file():
        pytest.skip(f"no demo model at {source}")
    (comfyui.models / "diffusion_models" / source.name).symlink_to(source)
    return source.name


@pytest.fixture(scope="module")
def flux_file(comfyui: SimpleNamespace) -> Iterator[Path]:
    """One double and one single block at full width."""
    tensors = tiny.native_state_dict(Flux(), tiny.build(Flux(), FLUX_CONFIG), FLUX_CONFIG)
    file = comfyui.models / "diffusion_models" / "flux.safetensors"
    save_file({name: t.to(torch.bfloat16).contiguous() for name, t in tensors.items()}, file)
    yield file
    file.unlink()  # more than a gigabyte
