"""IP-Adapters and pictures that cannot be applied: an error of the node, which costs nothing that runs."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from comfy_xdit.headless.surroundings import HEADLESS
from comfy_xdit.nodes.ip_adapter import apply_ip_adapter, load_ip_adapter
from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.parallel import ParallelConfig
from comfy_xdit.protocol.spec import ModelSpec
from comfy_xdit.ranks.registry import worker_group
from comfy_xdit.remote.ip_adapter import at_sigmas
from comfy_xdit.remote.model import RemoteModel
from tests import lora_files, tiny
from tests.ip_adapter_files import encoded, tensors_for, write

TWO = ParallelConfig(ulysses_degree=2)
KEY = {
    "sd3": "ip_adapter.1.to_k_ip.weight",
    "flux": "double_blocks.1.processor.ip_adapter_double_stream_k_proj.weight",
}
FIRST = {"sd3": "image_proj.proj_in.weight", "flux": "ip_adapter_proj_model.proj.weight"}
MORE = {"sd3": "ip_adapter.9.to_k_ip.weight", "flux": KEY["flux"].replace("1", "9")}


@pytest.fixture(scope="module", params=["sd3", "flux"])
def model(request, tiny_models):
    return tiny_models[request.param]


@pytest.fixture(scope="module")
def remote(model):
    remote = RemoteModel(ModelSpec.of(model.file, "transformer"), TWO)
    remote.load()
    return remote


@pytest.fixture
def survives(remote, model, tmp_path):
    """The same processes draw the same, to the bit, before and after; and a good adapter still works."""
    x = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    inputs = (x, torch.full((1,), 0.7), tiny.conditions(model.family, model.config, 5))
    before, pids = remote.denoise(*inputs), list(worker_group(TWO).pids)
    yield inputs
    assert torch.equal(remote.denoise(*inputs), before)
    good = applied(remote, write(model, 1, tmp_path / "good.safetensors"), encoded(model))
    pictures = at_sigmas(good.pictures, lambda percent: 1.0 - percent)
    assert not torch.equal(remote.denoise(*inputs, image_prompts=pictures), before)
    assert worker_group(TWO).pids == pids


def applied(remote, path, output, weight=1.0, start=0.0, end=1.0):
    adapter = load_ip_adapter(str(path), HEADLESS)
    return apply_ip_adapter(remote, adapter, output, weight, start, end, here=HEADLESS)


def _file(kind: str, model, other, path):
    """A file that is wrong in one way."""
    tensors, name = tensors_for(model, 1), model.family.name
    if kind == "other family":
        tensors = tensors_for(other, 1)
    elif kind == "other width":
        tensors[KEY[name]] = torch.ones(96, tensors[KEY[name]].shape[1])
    elif kind == "a block is missing":
        del tensors[KEY[name]]
    elif kind == "a block too many":
        tensors[MORE[name]] = tensors[KEY[name]].clone()
    elif kind == "no projection":
        del tensors[FIRST[name]]
    elif kind == "a vector where a matrix belongs":
        tensors[FIRST[name]] = torch.ones(5)
    elif kind == "LoRA":
        tensors = lora_files.write(model, lora_files.NAMINGS["kohya"], 1)[0]
    elif kind == "XLabs LoRA":
        tensors = {"double_blocks.0.processor.qkv_lora1.down.weight": torch.ones(4, 128)}
    elif kind == "no tensors":
        tensors = {}
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:9000])
    elif kind == "pickle":
        return path.rename(path.with_suffix(".bin"))
    return path


FILES = {
    "other family": r"is no IP-Adapter for \w+: its \d+ tensors begin with .*XLabs' for FLUX",
    "other width": r"has shape \(96, \d+\), this \w+ needs \(\d+, \d+\); choose an IP-Adapter made for",
    "a block is missing": r"has no \S*1\S* and so is not for this \w+, where .* adds to \d attentions",
    "a block too many": r"which is for nothing in this \w+, where an IP-Adapter adds to \d attentions",
    "no projection": r"lacks '\S+', which an IP-Adapter for \w+ has; choose a complete file",
    "a vector where a matrix belongs": r"has tensors of shapes that no IP-Adapter .*download it again",
    "LoRA": r"bad\.safetensors is no IP-Adapter for",
    "XLabs LoRA": r"is no IP-Adapter for .*begin with double_blocks\.0\.processor\.qkv_lora1",
    "no tensors": r"its 0 tensors begin with nothing",
    "empty": r"bad\.safetensors \(0 bytes\) is damaged",
    "truncated": r"bad\.safetensors \(9000 bytes\) is damaged.*download it again",
    "pickle": r"bad\.bin is a pickle file, which can run code",
}


@pytest.mark.parametrize("kind", FILES)
def test_files(remote, survives, model, tiny_models, tmp_path, kind):
    other = tiny_models["flux" if model.family.name == "sd3" else "sd3"]
    path = _file(kind, model, other, tmp_path / "bad.safetensors")
    with pytest.raises(InvalidInput, match=FILES[kind]):
        applied(remote, path, encoded(model))


def _picture(kind: str, model) -> SimpleNamespace:
    output = encoded(model)
    if kind == "another encoder's":
        return SimpleNamespace(**{name: value[..., :-1] for name, value in vars(output).items()})
    if kind == "no picture":
        return SimpleNamespace(**{name: value[:0] for name, value in vars(output).items()})
    if kind == "of other dimensions":
        return SimpleNamespace(**{name: value[None, None] for name, value in vars(output).items()})
    if kind == "NaN":
        return SimpleNamespace(**{name: value * torch.nan for name, value in vars(output).items()})
    return SimpleNamespace(last_hidden_state=output.image_embeds)


PICTURES = {
    "another encoder's": r"has shape \(1, .*\), good\.safetensors takes \(pictures, .*\d+\); encode it",
    "no picture": r"has shape \(0, .*takes \(pictures",
    "of other dimensions": r"has shape \(1, 1, 1, .*takes \(pictures",
    "NaN": r"of the encoded picture holds values that are not finite",
    "nothing": r"takes \w+, and clip_vision_output has nothing; connect the output of CLIP Vision Encode",
}


@pytest.mark.parametrize("kind", PICTURES)
def test_pictures(remote, survives, model, tmp_path, kind):
    path = write(model, 1, tmp_path / "good.safetensors")
    with pytest.raises(InvalidInput, match=PICTURES[kind]):
        applied(remote, path, _picture(kind, model))


def test_several_pictures_at_once_are_for_flux(remote, survives, model, tmp_path):
    path = write(model, 1, tmp_path / "good.safetensors")
    if model.family.name == "flux":
        assert len(applied(remote, path, encoded(model, pictures=2)).pictures) == 1
        return
    with pytest.raises(InvalidInput, match=r"2 pictures were encoded at once.*takes 1; encode each of them"):
        applied(remote, path, encoded(model, pictures=2))


@pytest.mark.parametrize(
    "widgets, words",
    [
        ({"start": 0.8, "end": 0.2}, r"start_percent 0\.8 is not before end_percent 0\.2"),
        ({"weight": float("nan")}, r"weight is nan; set a finite number"),
    ],
    ids=["range", "weight"],
)
def test_widgets(remote, survives, model, tmp_path, widgets, words):
    with pytest.raises(InvalidInput, match=words):
        applied(remote, write(model, 1, tmp_path / "good.safetensors"), encoded(model), **widgets)


def test_what_is_no_model_and_no_adapter(remote, tmp_path):
    with pytest.raises(InvalidInput, match="str is neither a MODEL"):
        apply_ip_adapter("model", None, None, 1.0, 0.0, 1.0, here=HEADLESS)
    with pytest.raises(InvalidInput, match="ip_adapter is a str; connect"):
        apply_ip_adapter(remote, "file", None, 1.0, 0.0, 1.0, here=HEADLESS)
    with pytest.raises(InvalidInput, match=r"no IP-Adapter .*gone\.safetensors"):
        load_ip_adapter(str(tmp_path / "gone.safetensors"), HEADLESS)


@pytest.mark.parametrize("when", ["changed", "gone"])
def test_a_file_that_changes_after_the_node(remote, survives, model, tmp_path, when):
    path = write(model, 1, tmp_path / "one.safetensors")
    pictures = at_sigmas(applied(remote, path, encoded(model)).pictures, lambda percent: 1.0 - percent)
    os.utime(path, ns=(1, 1)) if when == "changed" else path.unlink()
    with pytest.raises(InvalidInput, match=r"was changed after|no IP-Adapter file at"):
        remote.denoise(*survives, image_prompts=pictures)
