"""Files whose header is in order and whose weights are not, and files that change: named by the ranks."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from comfy_xdit.demo_files import DEMO
from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.messages import Forget, Sample
from comfy_xdit.protocol.parallel import ParallelConfig
from comfy_xdit.protocol.spec import IPAdapterFile, ModelSpec
from comfy_xdit.ranks.registry import worker_group
from comfy_xdit.remote import RemoteModel, RemoteTextEncoders, RemoteVAE
from tests import ip_adapter_files, tiny, vaes

TWO = ParallelConfig(ulysses_degree=2)
PATCH = "joint_blocks.1.x_block.mlp.fc1.weight"


@pytest.fixture
def model(tiny_models: dict[str, Any], tmp_path: Path) -> RemoteModel:
    """A model of its own, whose file a test may change."""
    file = tmp_path / "model.safetensors"
    shutil.copy(tiny_models["sd3"].file, file)
    return RemoteModel(ModelSpec.of(file, "transformer"), TWO)


def change(file: Path, name: str, new: Any) -> Path:
    """Replace a tensor of a file by what `new` makes of it."""
    tensors = load_file(file)
    tensors[name] = new(tensors[name].clone())
    save_file(tensors, file)
    return file


def with_nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor.view(-1)[-1] = torch.nan
    return tensor


def integers(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.int64)


def given(seed: int = 7) -> dict[str, torch.Tensor]:
    """Conditions for one row."""
    generator = torch.Generator().manual_seed(seed)
    config = tiny.SD3_CONFIG
    context = torch.randn(1, 8, config["joint_attention_dim"], generator=generator)
    return {"context": context, "y": torch.randn(1, config["pooled_projection_dim"], generator=generator)}


def denoise(model: RemoteModel, **more: Any) -> torch.Tensor:
    x = torch.ones(1, 16, 8, 8)
    return model.denoise(x, torch.full((1,), 500.0), given() | more)


def sampled(model: RemoteModel) -> torch.Tensor:
    noise = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    sigmas = torch.linspace(1.0, 0.0, 4)
    return model.sample(
        Sample(model.spec, "euler", sigmas, noise * 0, noise, 1.0, given(), None, sigmas * 1000)
    )


# ---------------------------------------------------------------------- a file that is replaced


def test_a_file_replaced_while_its_model_is_cached_is_refused_until_its_loader_runs_again(model):
    model.load()
    first, group = denoise(model), worker_group(TWO)
    pids = list(group.pids)
    file = change(Path(model.spec.path), PATCH, lambda t: t + 0.1)
    assert torch.equal(denoise(model), first)  # what is loaded is what was named
    group.call(Forget(specs=(model.spec,)))

    for call in (denoise, sampled, RemoteModel.load):
        with pytest.raises(
            InvalidInput, match=r"model\.safetensors was changed after the node .* run the workf"
        ):
            call(model)
    assert list(group.pids) == pids
    again = RemoteModel(ModelSpec.of(file, "transformer"), TWO)
    assert not torch.equal(denoise(again), first)


def test_a_file_of_the_same_size_and_one_that_is_gone(model):
    file = Path(model.spec.path)
    status = file.stat()
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    with pytest.raises(InvalidInput, match="was changed after the node"):
        denoise(model)
    file.unlink()
    with pytest.raises(InvalidInput, match=r"no file or folder at .*model\.safetensors; choose a model"):
        denoise(model)


def test_a_vae_and_a_pipeline_replaced_while_cached(tmp_path):
    folder = tmp_path / "pipeline"
    shutil.copytree(DEMO / "pipeline", folder)
    vae = RemoteVAE(ModelSpec.of(folder, "vae"), TWO)
    encoders = RemoteTextEncoders(ModelSpec.of(folder, "text_encoders"), TWO)
    (folder / "vae" / "config.json").write_text((folder / "vae" / "config.json").read_text() + "\n")
    with pytest.raises(InvalidInput, match="pipeline was changed after the node"):
        vae.decode(torch.zeros(1, 16, 4, 4))
    with pytest.raises(InvalidInput, match="pipeline was changed after the node"):
        encoders.encode({"l": [[("a", 1.0)]]})


# ---------------------------------------------------------------------- dtypes that are no weights


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8, torch.complex64])
def test_a_weight_that_is_no_floating_point_is_refused(model, dtype):
    file = change(Path(model.spec.path), PATCH, lambda t: t.to(dtype))
    with pytest.raises(
        InvalidInput, match=rf"model\.safetensors: {PATCH} holds .* numbers, which are no weig"
    ):
        RemoteModel(ModelSpec.of(file, "transformer"), TWO).load()


def test_doubles_are_weights(model):
    model.load()
    expected = denoise(model)
    file = change(Path(model.spec.path), PATCH, lambda t: t.double())
    assert torch.equal(denoise(RemoteModel(ModelSpec.of(file, "transformer"), TWO)), expected)


def test_integers_in_a_vae_an_encoder_and_an_ip_adapter(tmp_path, tiny_models):
    tensors = vaes.ldm_names(vaes.build("AutoencoderKL"))
    file = tmp_path / "vae.safetensors"
    save_file({name: t.contiguous() for name, t in tensors.items()}, file)
    change(file, "decoder.conv_in.weight", integers)
    with pytest.raises(InvalidInput, match=r"vae\.safetensors: decoder\.conv_in\.weight holds I64 numbers"):
        RemoteVAE(ModelSpec.of(file, "vae"), TWO).load()

    folder = tmp_path / "pipeline"
    shutil.copytree(DEMO / "pipeline", folder)
    name = "text_model.embeddings.token_embedding.weight"
    change(folder / "text_encoder" / "model.safetensors", name, integers)
    with pytest.raises(InvalidInput, match=rf"{name} holds I64 numbers, which are no weights"):
        RemoteTextEncoders(ModelSpec.of(folder, "text_encoders"), TWO).load()

    net = tiny_models["sd3"]
    adapter = ip_adapter_files.write(net, 1, tmp_path / "ip.safetensors")
    name = next(n for n in load_file(adapter) if n.endswith("to_k_ip.weight"))
    change(adapter, name, integers)
    remote = RemoteModel(ModelSpec.of(net.file, "transformer"), TWO)
    remote.load()
    with pytest.raises(InvalidInput, match=rf"ip\.safetensors: {name} holds I64 numbers"):
        remote.check_ip_adapter(IPAdapterFile.of(adapter), {})


# ---------------------------------------------------------------------- weights that are not finite

NAMED = rf"model\.safetensors: {PATCH} holds values that are not finite in float32 .*; the file is damaged"


def test_a_nan_in_a_weight_is_named_by_its_tensor_and_the_ranks_stay(model, tiny_models):
    file = change(Path(model.spec.path), PATCH, with_nan)
    broken = RemoteModel(ModelSpec.of(file, "transformer"), TWO)
    broken.load()  # the header is in order, and nobody reads every weight of every file
    pids = list(worker_group(TWO).pids)
    for call in (denoise, sampled):
        with pytest.raises(InvalidInput, match=NAMED):
            call(broken)
    good = RemoteModel(ModelSpec.of(tiny_models["sd3"].file, "transformer"), TWO)
    assert torch.isfinite(denoise(good)).all()
    assert worker_group(TWO).pids == pids


def test_what_is_not_finite_with_finite_weights_is_not_blamed_on_them(model):
    model.load()
    with pytest.raises(
        InvalidInput, match=r"computed values that are not finite .*weights are finite in float32"
    ):
        denoise(model, y=torch.full((1, tiny.SD3_CONFIG["pooled_projection_dim"]), torch.nan))
    with pytest.raises(InvalidInput, match="the latent holds values that are not finite"):
        model.denoise(torch.full((1, 16, 8, 8), torch.nan), torch.full((1,), 500.0), given())


def test_a_nan_in_a_vae_and_in_an_encoder(tmp_path):
    folder = tmp_path / "pipeline"
    shutil.copytree(DEMO / "pipeline", folder)
    change(folder / "vae" / "diffusion_pytorch_model.safetensors", "decoder.conv_out.bias", with_nan)
    change(folder / "vae" / "diffusion_pytorch_model.safetensors", "encoder.conv_in.bias", with_nan)
    name = "text_model.final_layer_norm.weight"
    change(folder / "text_encoder_2" / "model.safetensors", name, with_nan)
    vae = RemoteVAE(ModelSpec.of(folder, "vae"), TWO)
    for call in (lambda: vae.decode(torch.zeros(1, 16, 4, 4)), lambda: vae.encode(torch.zeros(1, 64, 64, 3))):
        with pytest.raises(
            InvalidInput, match=r"(decoder\.conv_out|encoder\.conv_in)\.bias holds values that are"
        ):
            call()
    encoders = RemoteTextEncoders(ModelSpec.of(folder, "text_encoders"), TWO)
    prompts = {name: [[("a red circle", 1.0)]] for name in ("l", "g")}
    with pytest.raises(InvalidInput, match=rf"text_encoder_2: {name} holds values that are not finite"):
        encoders.encode(prompts)


@pytest.mark.parametrize("layout", ["pipefusion_degree", "shard_weights"])
def test_a_nan_in_a_weight_that_one_rank_has_is_named_by_all(model, layout):
    parallel = (
        ParallelConfig(pipefusion_degree=2)
        if layout == "pipefusion_degree"
        else ParallelConfig(ulysses_degree=2, shard_weights=True)
    )
    file = change(Path(model.spec.path), PATCH, with_nan)
    broken = RemoteModel(ModelSpec.of(file, "transformer"), parallel)
    broken.load()
    pids = list(worker_group(parallel).pids)
    with pytest.raises(InvalidInput, match=NAMED):
        sampled(broken)
    assert list(worker_group(parallel).pids) == pids
