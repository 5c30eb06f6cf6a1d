"""Ranks that are killed on a device, forked on one, and files in fp8: the next call is right."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from comfy_xdit.protocol.errors import WorkerDied
from comfy_xdit.protocol.parallel import ParallelConfig
from comfy_xdit.protocol.spec import ModelSpec
from comfy_xdit.ranks import template
from comfy_xdit.ranks.registry import running_groups, worker_group
from comfy_xdit.remote.model import RemoteModel
from tests import pipefusion_runs as runs
from tests.gpu.device import AS_EXACT, DTYPES, EXACT, exact, here, inputs, plain
from tests.tiny import TinyModel, relative_l2
from tests.waiting import ends_within

TWO = here(ParallelConfig(ulysses_degree=2))
DEATH = 10.0  # seconds in which a death is known, on a busy machine


def handle(model: TinyModel, layout: ParallelConfig, dtype: str = "bf16") -> RemoteModel:
    return RemoteModel(ModelSpec.of(model.file, "transformer", dtype), layout)


def test_a_rank_killed_while_idle_costs_no_call(tiny_models):
    model = tiny_models["flux"]
    remote = handle(model, TWO)
    before, pids = remote.denoise(*inputs(model)), worker_group(TWO).pids
    os.kill(pids[1], signal.SIGKILL)
    assert ends_within(pids[1], DEATH)
    assert torch.equal(remote.denoise(*inputs(model)), before)
    assert set(pids).isdisjoint(worker_group(TWO).pids)


def test_a_rank_killed_in_a_run_is_an_error_and_the_next_run_is_right(tiny_models):
    model = tiny_models["flux"]
    spec = ModelSpec.of(model.file, "transformer", "bf16")
    asked = replace(runs.request(model, steps=400, cfg=1.0), spec=spec)
    few = replace(asked, sigmas=torch.linspace(1.0, 0.0, 4), timesteps=torch.linspace(1.0, 0.0, 4))
    remote = handle(model, TWO)
    before = remote.sample(few)
    (killed,) = worker_group(TWO).pids[1:]
    seen: list[float] = []

    def kill(_progress) -> None:
        if not seen:
            seen.append(time.monotonic())
            threading.Thread(target=os.kill, args=(killed, signal.SIGKILL)).start()

    with pytest.raises(WorkerDied, match="rank 1"):
        remote.sample(asked, on_progress=kill)
    assert time.monotonic() - seen[0] <= DEATH
    assert torch.equal(remote.sample(few), before)


@pytest.mark.parametrize("forks", ["1", "0"])
def test_ranks_that_are_forked_and_spawned_compute_alike(tiny_models, monkeypatch, forks: str):
    """On a GPU forking is asked for, until this test has been green on one (docs/gpu.md)."""
    model = tiny_models["sd3"]
    for group in running_groups():
        group.close()
    template.close_template()
    monkeypatch.setattr(template, "_failures", 0)
    monkeypatch.setenv(template.FORK, forks)
    error = relative_l2(handle(model, TWO, "fp32").denoise(*inputs(model)), exact(model))
    pids = worker_group(TWO).pids
    forked = ["worker.template" in psutil.Process(pid).cmdline() for pid in pids]
    assert error <= EXACT
    assert forked == [forks == "1"] * 2, "the log names what an import has opened or started"


@pytest.mark.parametrize("layout", [here(ParallelConfig()), TWO], ids=["1 rank", "2 ranks"])
@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_a_file_in_fp8_is_computed_in_bf16(tiny_models, tmp_path: Path, stored: torch.dtype, layout):
    """Every number of the file is one of bf16's, so plain diffusers can have the same weights."""
    model = tiny_models["flux"]
    tensors = {name: t.to(stored) for name, t in load_file(model.file).items()}
    save_file(tensors, tmp_path / "fp8.safetensors")
    save_file({name: t.float() for name, t in tensors.items()}, tmp_path / "same.safetensors")
    one = replace(model, file=tmp_path / "fp8.safetensors")
    same = replace(model, file=tmp_path / "same.safetensors")
    wanted = handle(same, layout, "fp32").denoise(*inputs(model)).float()
    rounding = relative_l2(plain(model, DTYPES["bf16"]), exact(model))
    got = handle(one, layout, "bf16").denoise(*inputs(model)).float()
    assert 0 < relative_l2(got, wanted) <= 2 * AS_EXACT * rounding
