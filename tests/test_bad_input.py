"""Everything a person can get wrong, one after another, on one living group that outlives it all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from comfy_xdit import cli
from comfy_xdit.headless.workflow import NodeFailed, node_classes, run_file
from comfy_xdit.nodes.config import parallel_config
from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.ranks.registry import running_groups
from tests import tiny
from worker.models.sd3.family import SD3

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "workflows" / "api" / "demo.json"
FILE = ROOT / "assets" / "demo" / "demo_sd3.safetensors"
TWO = {"strategy": "manual", "ulysses_degree": 2, "devices": "cpu,cpu"}


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    """The demo graph on two ranks, few steps."""
    workflow = json.loads(DEMO.read_text())
    workflow["1"]["inputs"] |= TWO
    workflow["3"]["inputs"]["steps"] = 2
    file = tmp_path_factory.mktemp("graph") / "demo.json"
    file.write_text(json.dumps(workflow))
    return file


def run(file: Path, *settings: str) -> Any:
    return run_file(file, settings, file.parent / "output", quiet=True)


def with_loader(graph: Path, folder: Path, unet_name: str) -> Path:
    """The demo graph with its MODEL from a single file."""
    workflow = json.loads(graph.read_text())
    inputs = {"unet_name": unet_name, "weight_dtype": "default", "parallel": ["1", 0]}
    workflow["10"] = {"class_type": "XDiTLoadDiffusionModel", "inputs": inputs}
    workflow["3"]["inputs"]["model"] = ["10", 0]
    file = folder / "loader.json"
    file.write_text(json.dumps(workflow))
    return file


def truncated(folder: Path) -> Path:
    file = folder / "truncated.safetensors"
    file.write_bytes(FILE.read_bytes()[:100_000])
    return file


def other_family(folder: Path) -> Path:
    file = folder / "sdxl.safetensors"
    save_file({"input_blocks.0.0.weight": torch.zeros(4)}, file)
    return file


def one_head(folder: Path) -> Path:
    config = {**tiny.SD3_CONFIG, "num_attention_heads": 1, "caption_projection_dim": 64}
    return tiny.write_native(SD3(), tiny.build(SD3(), config), config, folder / "one.safetensors")


def pickled(folder: Path) -> Path:
    file = folder / "model.ckpt"
    file.write_bytes(b"\x80\x04")
    return file


FILES = {
    "truncated file": (truncated, r"truncated.safetensors \(100000 bytes\) is damaged.*download it again"),
    "wrong family": (other_family, r"none of the families sd3, flux.*choose"),
    "fewer heads than ranks": (one_head, r"ulysses_degree 2 is more than the 1 attention heads.*set"),
    "pickle": (pickled, r"pickle file, which can run code; convert it"),
}
VALUES = {
    "missing pipeline": (("4.pipeline=nowhere",), r"nowhere"),
    "degrees that do not fit": (("1.cfg_parallel_degree=2",), r"= 4, but 2 devices are selected.*set"),
    "nobody to share weights with": (
        ("1.shard_weights=true", "1.ulysses_degree=1", "1.devices=cpu"),
        r"shard_weights spreads weights over ranks.*Set shard_weights to false",
    ),
    "nobody for auto to share weights with": (
        ("1.shard_weights=true", "1.strategy=auto", "1.devices=cpu"),
        r"shard_weights spreads weights over ranks.*Set shard_weights to false",
    ),
    "unknown device": (("1.devices=cuda:77,cpu",), r"cuda:77.*is not one of"),
    "prompt of the wrong type": (("6.text=[1, 2]",), r"text"),
    "sampler that is not there": (("3.sampler_name=uni_pc",), r"uni_pc"),
}


def test_all_of_it_on_one_living_group(graph, tmp_path, capsys):
    first = run(graph).outputs["3"][0]["samples"]
    (group,) = running_groups()
    pids = list(group.pids)
    assert len(pids) == 2

    def survives(what: str) -> None:
        again = run(graph).outputs["3"][0]["samples"]
        assert [g.pids for g in running_groups()] == [pids], f"{what} cost the group"
        assert torch.equal(again, first), f"{what} changed what the group draws"

    for what, (settings, words) in VALUES.items():
        with pytest.raises((InvalidInput, NodeFailed), match=words):
            run(graph, *settings)
        survives(what)
    missing = with_loader(graph, tmp_path, str(tmp_path / "gone.safetensors"))
    with pytest.raises((InvalidInput, NodeFailed), match=r"gone.safetensors"):
        run(missing)
    survives("missing file")
    for what, (make, words) in FILES.items():
        file = with_loader(graph, tmp_path, str(make(tmp_path)))
        with pytest.raises(NodeFailed, match=words) as caught:
            run(file)
        assert caught.value.node == "10" and isinstance(caught.value.__cause__, InvalidInput)
        survives(what)
    for what, latent, words in latents():
        with pytest.raises(InvalidInput, match=words):
            sample_with(latent)
        survives(what)


def latents() -> list[tuple[str, torch.Tensor, str]]:
    good = torch.ones(1, 16, 16, 16)
    infinite = good.clone()
    infinite[0, 0, 0, 0] = torch.inf
    return [
        ("wrong channels", good[:, :4], r"latent has 4 channels, the model takes 16"),
        ("not finite", infinite, r"latent holds values that are infinite or not a number"),
        ("not 4-D", good[0], r"latent has the shape \(16, 16, 16\)"),
    ]


def sample_with(latent: torch.Tensor) -> None:
    layout = parallel_config("manual", "cpu,cpu", ulysses_degree=2)
    model, clip, _ = node_classes()["XDiTLoadPipeline"]().load("demo (comfy_xdit)", "default", layout)
    cond, pooled, _ = clip.encode({name: [[("a small red circle", 1.0)]] for name in ("l", "g")})
    conditioning = [[cond, {"pooled_output": pooled}]]
    node_classes()["XDiTSampler"]().sample(
        model, latent_image={"samples": latent}, steps=2, seed=0, cfg=3.0, sampler_name="euler",
        scheduler="simple", positive=conditioning, negative=conditioning, denoise=1.0,
    )  # fmt: skip


def test_another_layout_that_cannot_work_does_not_cost_the_running_group(graph):
    """Four ranks do not fit the demo's two heads: the two that run are asked before they would go."""
    run(graph)
    (group,) = running_groups()
    pids = list(group.pids)
    with pytest.raises(NodeFailed, match=r"ulysses_degree 4 is more than the 2 attention heads"):
        run(graph, "1.ulysses_degree=4", "1.devices=cpu,cpu,cpu,cpu")
    assert [g.pids for g in running_groups()] == [pids]


@pytest.mark.parametrize("setting", ["4.pipeline=nowhere", "1.ring_degree=0", "99.text=x"])
def test_the_command_ends_with_2_and_no_traceback(graph, setting, capsys):
    code = cli.main(["run", str(graph), "--set", setting, "--quiet", "--output", str(graph.parent)])
    assert code == 2
    told = capsys.readouterr().err
    assert told.startswith("comfy-xdit: ") and "Traceback" not in told
