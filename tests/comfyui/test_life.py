"""ComfyUI's unloading, cached and dropped outputs, graphs that alternate: the ranks' memory follows."""

import asyncio
import copy
import json
import os
import shutil
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file, save_file

from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.ranks.environment import ROOT
from tests.comfyui.inputs import DEMO, layout, one_step
from tests.comfyui.server import Client, Run, Server

SAMPLER, LOADER, STATUS = "3", "4", "90"
PROMPTS, WARM = 50, 14  # the first ones fill caches, of torch and of ComfyUI
MIB = 1 << 20


# ---------------------------------------------------------------------- in this process


@pytest.fixture
def model(run_node, tiny_sd3) -> Any:
    return run_node("XDiTLoadDiffusionModel", unet_name=tiny_sd3, weight_dtype="default", parallel=layout(2))[
        0
    ]


def _ranks(model: Any) -> list[dict[str, Any]]:
    from comfy_xdit.comfy_types.model.handles import remote_of
    from comfy_xdit.protocol.messages import Status
    from comfy_xdit.ranks.registry import worker_group

    group = worker_group(remote_of(model).parallel)
    return [group.call(Status(), ranks=(rank,)).value for rank in range(2)]


def test_unloading_all_models_releases_the_ranks_and_the_next_run_loads_again(run_node, model):
    import comfy.model_management

    before = one_step(run_node, model)
    assert all(rank["bytes"] > 0 and rank["tensors"] > 0 for rank in _ranks(model))

    comfy.model_management.unload_all_models()

    assert all(rank["bytes"] == rank["tensors"] == rank["patches"] == 0 for rank in _ranks(model))
    assert (one_step(run_node, model) == before).all()


def test_a_file_replaced_while_its_model_is_cached_is_refused_until_the_loader_runs(
    comfyui, run_node, tiny_sd3
):
    import comfy.model_management

    file = comfyui.models / "diffusion_models" / "replaced.safetensors"
    shutil.copy(comfyui.models / "diffusion_models" / tiny_sd3, file)
    inputs = {"unet_name": file.name, "weight_dtype": "default", "parallel": layout(2)}
    node = comfyui.mappings["XDiTLoadDiffusionModel"]
    (cached,), stamp = run_node("XDiTLoadDiffusionModel", **inputs), node.IS_CHANGED(**inputs)
    before = one_step(run_node, cached)
    assert node.IS_CHANGED(**inputs) == stamp  # what ComfyUI asks before it takes an output from its cache

    save_file({name: 1.1 * tensor for name, tensor in load_file(file).items()}, file)
    comfy.model_management.unload_all_models()

    assert node.IS_CHANGED(**inputs) != stamp
    with pytest.raises(
        InvalidInput, match=r"replaced\.safetensors was changed after the node .* run the work"
    ):
        one_step(run_node, cached)
    with pytest.raises(InvalidInput, match=r"replaced\.safetensors was changed after the node"):
        cached.model.diffusion_model.x_embedder.state_dict()  # lent to ControlNets
    (again,) = run_node("XDiTLoadDiffusionModel", **inputs)
    assert not (one_step(run_node, again) == before).all()


def test_the_loaders_of_pipelines_and_vaes_notice_other_files(comfyui):
    folder = comfyui.models / "diffusers" / "copied"
    shutil.copytree(DEMO / "pipeline", folder)
    file = comfyui.models / "vae" / "copied.safetensors"
    shutil.copy(folder / "vae" / "diffusion_pytorch_model.safetensors", file)
    pipeline, vae = (comfyui.mappings[f"XDiTLoad{what}"] for what in ("Pipeline", "VAE"))
    before = (
        pipeline.IS_CHANGED(pipeline="copied", weight_dtype="default"),
        vae.IS_CHANGED(vae_name=file.name),
    )
    for changed in (folder / "vae" / "config.json", file):
        status = changed.stat()
        os.utime(changed, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))
    after = pipeline.IS_CHANGED(pipeline="copied", weight_dtype="default"), vae.IS_CHANGED(vae_name=file.name)
    assert before[0] != after[0] and before[1] != after[1]
    shutil.rmtree(folder)
    file.unlink()


def test_making_room_for_others_is_an_idle_hint_only(run_node, model):
    import comfy.model_management

    one_step(run_node, model)
    loads = [rank["loads"] for rank in _ranks(model)]
    comfy.model_management.free_memory(1e30, model.load_device)
    assert model.loaded_size() == 0
    one_step(run_node, model)
    assert [rank["loads"] for rank in _ranks(model)] == loads


def test_two_models_in_one_graph_do_not_reload_each_other(run_node, model, tiny_sd3):
    (other,) = run_node("XDiTLoadDiffusionModel", unet_name=tiny_sd3, weight_dtype="bf16", parallel=layout(2))
    loads = [rank["loads"] for rank in _ranks(model)]
    for _ in range(3):
        one_step(run_node, model)
        one_step(run_node, other)
    assert [rank["loads"] for rank in _ranks(model)] == loads


def test_the_status_says_what_runs(run_node, model):
    one_step(run_node, model)
    text = run_node("XDiTStatus", after=model)["result"][0]
    assert "2 ranks, ulysses_degree 2" in text
    assert "rank 1 (pid" in text and "tiny_sd3.safetensors (transformer, " in text
    assert "last Denoise: " in text and " sent, " in text
    assert " ms: compute " in text and ", communication " in text and ", bridge " in text
    assert "Logs of these ranks: " in text
    assert "differs from those known" not in text


# ---------------------------------------------------------------------- in a server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if not (DEMO / "pipeline").is_dir():
        pytest.skip("no demo model")
    running = Server(Path(os.environ["COMFYUI_DIR"]), tmp_path_factory.mktemp("life"))
    try:
        running.wait_until_ready()
        yield running
    finally:
        running.close()


@pytest.fixture(scope="module")
def workflows() -> SimpleNamespace:
    """Two graphs on one layout: the pipeline's own MODEL, and one from a single file in its place."""
    pipeline = json.loads((ROOT / "workflows" / "api" / "demo_ksampler.json").read_text())
    pipeline[SAMPLER]["inputs"]["steps"] = 2
    pipeline[STATUS] = {"class_type": "XDiTStatus", "inputs": {"after": [SAMPLER, 0]}}
    file = copy.deepcopy(pipeline)
    parallel = file[LOADER]["inputs"].get("parallel")
    names = {"unet_name": "demo_sd3 (comfy_xdit).safetensors", "weight_dtype": "default"}
    file["91"] = {
        "class_type": "XDiTLoadDiffusionModel",
        "inputs": names | ({"parallel": parallel} if parallel else {}),
    }
    file[SAMPLER]["inputs"]["model"] = ["91", 0]
    return SimpleNamespace(pipeline=pipeline, file=file)


async def _run(server: Server, prompt: dict[str, Any], seed: int) -> str:
    """Run a prompt to its end; returns the status' report."""
    changed = copy.deepcopy(prompt)
    changed[SAMPLER]["inputs"]["seed"] = seed
    async with Client(server) as client:
        run: Run = await client.run(changed)
    assert run.end == "execution_success", run.outcome
    (text,) = (
        data["output"]["text"][0]
        for _, kind, data in run.messages
        if kind == "executed" and data["node"] == STATUS
    )
    return text


def _resident(server: Server) -> dict[str, int]:
    """MiB of the server and of its largest rank."""
    ranks = [psutil.Process(pid).memory_info().rss for pid in server.ranks()]
    return {"host": psutil.Process(server.process.pid).memory_info().rss // MIB, "rank": max(ranks) // MIB}


def test_fifty_prompts_that_alternate_leave_memory_flat_and_load_each_model_once(server, workflows):
    measured: list[dict[str, int]] = []
    pids: set[tuple[int, ...]] = set()

    async def alternate() -> str:
        for turn in range(PROMPTS):
            text = await _run(server, [workflows.pipeline, workflows.file][turn % 2], seed=100 + turn)
            measured.append(_resident(server))
            pids.add(tuple(sorted(server.ranks())))
        return text

    text = asyncio.run(alternate())

    assert len(pids) == 1
    # The pipeline's transformer, text encoders and VAE, and the file's transformer.
    assert "4 models read from disk" in text, text
    print(f"memory in MiB after prompts {WARM} and {PROMPTS}: {measured[WARM]}, {measured[-1]}")
    # 36 prompts: less than half a MiB each. A reload that leaked would cost the 4 MiB of the demo's
    # transformer every time, 150 MiB in all.
    for who in ("host", "rank"):
        assert measured[-1][who] - measured[WARM][who] < 16, (who, [m[who] for m in measured])


@pytest.mark.parametrize("free_memory", [False, True], ids=["models", "models_and_cache"])
def test_free_releases_the_memory_of_the_ranks(server, workflows, free_memory):
    def report(seed: int) -> str:
        return asyncio.run(_run(server, workflows.file, seed))

    report(201)
    before = _resident(server)["rank"]
    body = json.dumps({"unload_models": True, "free_memory": free_memory}).encode()
    request = urllib.request.Request(f"{server.url}/free", data=body, method="POST")
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request, timeout=10):
        pass

    deadline = time.monotonic() + 10
    while _resident(server)["rank"] > before - 4 and time.monotonic() < deadline:
        time.sleep(0.1)
    print(f"memory of a rank in MiB: {before} before /free, {_resident(server)['rank']} after")
    assert _resident(server)["rank"] <= before - 4
    assert "demo_sd3.safetensors (transformer, " in report(202)  # they load again by themselves
