"""Model files that are written to, cut off or removed while the ranks have them loaded."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.parallel import ParallelConfig
from comfy_xdit.protocol.spec import ModelSpec
from comfy_xdit.ranks.registry import worker_group
from comfy_xdit.remote.model import RemoteModel
from comfy_xdit.remote.vae import RemoteVAE
from tests import tiny, vaes
from worker.checkpoints import Checkpoint, Source

ONE = ParallelConfig()


def delete(file: Path) -> None:
    file.unlink()


def cut_off(file: Path) -> None:
    os.truncate(file, 5000)


def write_over(file: Path) -> None:
    """As `cp` does: into the same file, whose size stays."""
    content = bytearray(file.read_bytes())
    behind = len(content) // 10  # the header
    content[behind:] = bytes(len(content) - behind)
    with file.open("r+b") as opened:
        opened.write(content)


CHANGES = [delete, cut_off, write_over]


@pytest.mark.parametrize("change", CHANGES)
def test_a_loaded_transformer_does_not_change_with_its_file(tiny_models, tmp_path, change: Callable):
    file = tmp_path / "model.safetensors"
    shutil.copyfile(tiny_models["sd3"].file, file)
    remote = RemoteModel(ModelSpec.of(file, "transformer"), ONE)
    x = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    given = tiny.conditions(tiny_models["sd3"].family, tiny_models["sd3"].config, 32)
    expected = remote.denoise(x, torch.ones(1), given)
    pids = worker_group(ONE).pids

    change(file)

    assert torch.equal(remote.denoise(x, torch.ones(1), given), expected)
    assert worker_group(ONE).pids == pids


@pytest.mark.parametrize("change", CHANGES)
def test_a_loaded_vae_does_not_change_with_its_file(tmp_path, change: Callable):
    vaes.build("AutoencoderKL").save_pretrained(tmp_path)
    remote = RemoteVAE(ModelSpec.of(tmp_path, "vae"), ONE)
    latent = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    expected = remote.decode(latent)
    pids = worker_group(ONE).pids

    change(tmp_path / "diffusion_pytorch_model.safetensors")

    assert torch.equal(remote.decode(latent), expected)
    assert worker_group(ONE).pids == pids


def test_a_file_that_is_written_to_while_it_is_read_is_refused(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(4), "b": torch.ones(4)}, file)
    os.utime(file, (0, 0))  # clocks of files tick every few milliseconds
    reading = Checkpoint.at(file).stream({"a": Source("a"), "b": Source("b")}, torch.float32)
    next(reading)
    save_file({name: 2 * tensor for name, tensor in load_file(file).items()}, file)
    with pytest.raises(InvalidInput, match=r"model\.safetensors was changed or removed"):
        list(reading)
