"""A class of ComfyUI's is spread only where its plan is proven on the ComfyUI at hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from comfy_xdit import families
from comfy_xdit.planning import auto
from comfy_xdit.protocol import proofs, remembered
from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.parallel import Automatic, ParallelConfig
from comfy_xdit.protocol.spec import HostComfyUI, ModelSpec
from comfy_xdit.ranks.registry import worker_group
from comfy_xdit.remote.model import RemoteModel
from tests.comfyui.changed_copy import end_ranks, hosting
from tests.comfyui.tiny_classes import write
from worker.models.comfyui.cases import CASES, Draw

TWO = ParallelConfig(ulysses_degree=2, devices=("cpu", "cpu"))
# In a copy: tokens that see each other between blocks, behind every name a plan knows; and a second rank that
# fails alone once its tokens are fewer than all (46), while the first waits for it in an exchange.
BLOCK = "            x = block(x, y, t0, y_lens, (H, W), **kwargs)  # (N, T, D)\n"
BLOCKS = "        for i, block in enumerate(self.single_blocks):\n"
CHANGES = {
    "pixart/pixartms.py": ((BLOCK, f"{BLOCK}            x = x + x.mean(1, keepdim=True)\n"),),
    "chroma/model.py": (
        (
            BLOCKS,
            f"{BLOCKS}            if __import__('os').environ['RANK'] == '1' and img.shape[1] < 40:\n"
            "                raise RuntimeError('this rank alone')\n",
        ),
    ),
}


@pytest.fixture(scope="module")
def host(comfyui, tmp_path_factory) -> Iterator[HostComfyUI]:
    """A copy of this ComfyUI whose models were changed, with its version number as it was."""
    with hosting(tmp_path_factory, CHANGES) as changed:
        yield changed


@pytest.fixture(scope="module")
def files(comfyui) -> dict[str, Path]:
    folder = comfyui.models / "diffusion_models"
    return {name: folder / write(name, folder) for name in ("auraflow", "pixart", "chroma", "flux")}


def remote(host: HostComfyUI, file: Path) -> RemoteModel:
    return RemoteModel(ModelSpec.of(file, "transformer", comfyui=host), TWO)


def call(model: RemoteModel, name: str) -> torch.Tensor:
    (x, timestep, context), _ = CASES[name].call(Draw(1))
    return model.denoise(x, timestep, {"context": context, "transformer_options": {}})


def records() -> dict[str, Any]:
    return json.loads((remembered.cache_folder() / proofs.NAME).read_text())


def test_what_is_not_right_is_refused_and_nothing_else_is_lost(host, files):
    right = remote(host, files["auraflow"])
    assert not right.load()["not_spread"]
    before, pids = call(right, "auraflow"), worker_group(TWO).pids

    with pytest.raises(InvalidInput, match=r"plan is not right for this ComfyUI's PixArtMS \(pixart: off by"):
        remote(host, files["pixart"]).load()
    with pytest.raises(InvalidInput, match=r"ComfyUI's Chroma \(chroma: RuntimeError: this rank alone"):
        remote(host, files["chroma"]).load()

    assert torch.equal(call(right, "auraflow"), before)
    assert worker_group(TWO).pids == pids, "no rank was ended for it"
    assert right.load()["blocks"] == 3
    # What one rank alone says may be the machine's fault: the next load tries again.
    assert {key.split()[0] for key in records()} == {"MMDiT", "PixArtMS"}


def test_the_planner_knows_why(host, files):
    two = Automatic(("cpu", "cpu"))
    spread, refused = (ModelSpec.of(files[n], "transformer", comfyui=host) for n in ("auraflow", "pixart"))

    assert not auto.description(spread).not_spread
    assert auto.layout_of(two, refused).world_size == 2, "both prompts at once"
    assert "pixart: off by" in auto.description(refused).not_spread
    ((_, why),) = [found for found in auto.classes_for(auto.layout_of(two, refused)) if "pixart" in found[0]]
    assert "both prompts at once; tokens are not spread: pixart: off by" in why


def test_auto_has_a_class_proven_that_nothing_is_known_of(host, files):
    """FLUX.1 has one prompt, so that both devices are left for its tokens."""
    unknown = ModelSpec.of(files["flux"], "transformer", comfyui=host)
    assert auto.description(unknown).not_spread == proofs.UNPROVEN

    layout = auto.layout_of(Automatic(("cpu", "cpu")), unknown)

    assert layout.ulysses_degree == 2
    assert not auto.description(unknown).not_spread


def test_doctor_shows_what_is_remembered(host):
    shown = "\n".join(families.lines(host))

    assert "MMDiT (" in shown and "Ulysses and Ring: yes" in shown
    assert "auraflow                proven: " in shown
    assert "Ulysses and Ring: no: pixart: off by" in shown


def test_new_ranks_go_by_what_is_remembered_and_another_source_is_proven_anew(host, files):
    """A record that says otherwise than the class shows that nothing was proven a second time."""
    (key,) = [key for key in records() if key.startswith("MMDiT ")]
    held = records()
    held[key]["tried"][0]["auraflow"]["wrong"] = "so it is remembered"
    (remembered.cache_folder() / proofs.NAME).write_text(json.dumps(held))
    end_ranks()
    with pytest.raises(InvalidInput, match=r"MMDiT \(auraflow: so it is remembered\)"):
        remote(host, files["auraflow"]).load()

    with open(Path(host.root) / "comfy" / "ldm" / "aura" / "mmdit.py", "a") as source:
        source.write("\n# a build of somebody's own, with the version number as it was\n")
    proofs.digest.cache_clear()  # as in a process that begins now
    end_ranks()
    assert not remote(host, files["auraflow"]).load()["not_spread"]
    assert len([key for key in records() if key.startswith("MMDiT ")]) == 2
