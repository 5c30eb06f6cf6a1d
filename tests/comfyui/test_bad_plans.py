"""What a ComfyUI, or a call, brings that cannot be spread: refused by name, and nothing else is lost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.messages import Prove
from comfy_xdit.protocol.parallel import ParallelConfig
from comfy_xdit.protocol.proofs import Proof
from comfy_xdit.protocol.spec import HostComfyUI, ModelSpec
from comfy_xdit.ranks.registry import worker_group
from comfy_xdit.remote.model import RemoteModel
from tests.comfyui.changed_copy import end_ranks, hosting
from tests.comfyui.inputs import relative_l2
from tests.comfyui.tiny_classes import module_of, write
from worker.models.comfyui.cases import CASES, Draw

TWO = ParallelConfig(ulysses_degree=2, devices=("cpu", "cpu"))
RIGHT = "auraflow"
JOINED = "        joint_hidden_states = optimized_attention_masked("
SELF = "        x = optimized_attention(q, k, v, self.num_heads, skip_reshape=True, attn_precision="
DIRECT = "    return optimized_attention(q_B_H_S_D, k_B_H_S_D, v_B_H_S_D, in_q_shape[-2], skip_reshape=True"
# A name of the plan that is gone; attention that is causal, that is computed elsewhere than at the seam, and
# that has a mask for each head, made of a rank's own tokens.
CHANGES = {
    "pixart/pixartms.py": (("self.attn = ", "self.renamed = "), ("self.attn(", "self.renamed(")),
    "hydit/attn_layers.py": (
        (
            SELF,
            "        x = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)\n"
            f"        x = x.transpose(1, 2).flatten(2)\n        return self.out_proj(x)\n{SELF}",
        ),
    ),
    "cosmos/predict2.py": (
        (
            DIRECT,
            "    scores = q_B_H_S_D @ k_B_H_S_D.transpose(-1, -2) * in_q_shape[-1] ** -0.5\n"
            f"    return (scores.softmax(-1) @ v_B_H_S_D).transpose(1, 2).flatten(2)\n{DIRECT}",
        ),
    ),
    "qwen_image/model.py": (
        (
            JOINED,
            "        of_heads = torch.linspace(0, 1, self.heads).view(1, self.heads, 1, 1)\n"
            "        attention_mask = attn_mask = of_heads.expand(-1, -1, -1, joint_key.shape[-2])\n"
            f"{JOINED}",
        ),
    ),
}
REFUSED = {
    "pixart": r"PixArtMS has no blocks\.\*\.attn, which its plan says attends",
    "hunyuan dit": r"attention that is causal .* is not split over ranks",
    "cosmos predict2": r"no attention of \w+ in MiniTrainDIT came to the seam",
    "qwen image": r"a mask over 2\d keys where there are 46 \(text image\)",
}


@pytest.fixture(scope="module")
def host(comfyui, tmp_path_factory) -> Iterator[HostComfyUI]:
    """A ComfyUI whose classes do what no plan says."""
    with hosting(tmp_path_factory, CHANGES) as changed:
        yield changed


@pytest.fixture(scope="module")
def files(comfyui) -> dict[str, Path]:
    folder = comfyui.models / "diffusion_models"
    return {name: folder / write(name, folder) for name in (RIGHT, "flux", "hunyuan3d 2.1", *REFUSED)}


def remote(host: HostComfyUI, file: Path) -> RemoteModel:
    return RemoteModel(ModelSpec.of(file, "transformer", comfyui=host), TWO)


def call(model: RemoteModel) -> torch.Tensor:
    (x, timestep, context), _ = CASES[RIGHT].call(Draw(1))
    return model.denoise(x, timestep, {"context": context, "transformer_options": {}})


def test_a_class_that_is_not_its_plans_is_refused_before_a_weight_is_read(host, files):
    right = remote(host, files[RIGHT])
    before, pids = call(right), worker_group(TWO).pids
    loaded = worker_group(TWO)

    for name, why in REFUSED.items():
        refusal = rf"ulysses_degree 2 .* cannot spread {files[name].name}.*{why}.*Set these degrees to 1"
        with pytest.raises(InvalidInput, match=refusal):
            remote(host, files[name]).load()
        assert torch.equal(call(right), before), name
    assert worker_group(TWO) is loaded and loaded.pids == pids


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": "9.9.9"}, r"the host runs ComfyUI 9\.9\.9, and .* holds .*: it was updated meanwhile"),
        (
            {"switches": (("force_upcast_attention", True),)},
            r"has imported ComfyUI .* with no switches, and is asked for .* with force_upcast_attention=True",
        ),
    ],
    ids=["version", "switches"],
)
def test_another_comfyui_than_the_hosts_is_refused(host, files, change: dict[str, Any], words: str):
    right = remote(host, files[RIGHT])
    before, pids = call(right), worker_group(TWO).pids

    with pytest.raises(InvalidInput, match=rf"{words}.*; restart ComfyUI"):
        remote(replace(host, **change), files[RIGHT]).load()

    assert torch.equal(call(right), before)
    assert worker_group(TWO).pids == pids


def test_a_mask_is_cut_by_its_heads_or_refused(host, files):
    """Through one call: a mask for each head is right on two ranks; one of other tokens is nobody's."""
    model, (module, _) = remote(host, files["flux"]), module_of(CASES["flux"])
    (x, timestep, context, y), more = CASES["flux"].call(Draw(1))
    tokens = context.shape[1] + 35
    per_head = torch.randn(1, 2, tokens, tokens, generator=torch.Generator().manual_seed(3)) * 3

    def on_ranks(mask: torch.Tensor) -> torch.Tensor:
        given = {"context": context, "y": y, **more, "attention_mask": mask, "transformer_options": {}}
        return model.denoise(x, timestep, given)

    def alone(mask: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return module(x, timestep, context, y, **more, attention_mask=mask, transformer_options={})

    right, pids = on_ranks(per_head), worker_group(TWO).pids
    assert relative_l2(right, alone(per_head)) <= 1e-5
    assert relative_l2(right, alone(per_head.flip(1))) >= 1e-4, "or heads would not matter here"
    with pytest.raises(InvalidInput, match=r"a mask over 45 keys where there are 46 .*choose cfg_parallel"):
        on_ranks(per_head[..., 1:, 1:])
    assert torch.equal(on_ranks(per_head), right)
    assert worker_group(TWO).pids == pids


def test_rows_that_depend_on_each_other_are_told_to_the_planner(host, files):
    """tests/comfyui/test_comfyui_classes.py compares them under CFG, where the class needs both rows."""
    assert remote(host, files["hunyuan3d 2.1"]).load()["rows_apart"] is False
    assert remote(host, files[RIGHT]).load()["rows_apart"] is True


def test_ranks_attend_as_the_hosts_switches_say(host, files):
    """New ranks: a process imports ComfyUI once."""
    found = {}
    for switches in ((), (("use_split_cross_attention", True),)):
        end_ranks()
        told = worker_group(TWO).call(Prove(replace(host, switches=switches), "MMDiT")).value
        found[switches] = {Proof.of(proof).attention for proof in told}
    split = found.popitem()[1]
    assert split == {"attention_split"} and found[()] != split
