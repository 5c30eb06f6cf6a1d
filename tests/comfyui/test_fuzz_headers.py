"""Files of models with tensors gone, renamed and of other shapes, through what reads them inside ComfyUI."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from comfy_xdit.protocol.safetensors_header import read_header
from tests.comfyui.tiny_classes import write
from tests.fuzzed_headers import ONE, Alone, Shapes, changed, check_model
from worker.parallel import RankGroups

EXAMPLES = 150
CLASSES = ("wan t2v", "z-image", "qwen edit")
Reader = Callable[[Path], Any]


def examples(count: int) -> settings:
    return settings(
        max_examples=count, database=None, deadline=None, derandomize=True,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


@pytest.fixture(scope="module")
def files(comfyui, tiny_sd3, tiny_flux) -> dict[str, Shapes]:
    """The tensors of a file that is read, by what it is."""
    folder = comfyui.models / "diffusion_models"
    names = [tiny_sd3, tiny_flux, *(write(name, folder) for name in CLASSES)]
    return {name: {n: (t.dtype, t.shape) for n, t in read_header(folder / name).items()} for name in names}


@pytest.fixture(scope="module")
def readers(comfyui) -> dict[str, Reader]:
    """On the host and in the ranks."""
    from comfy_xdit.comfy_types.choice import spec_of
    from comfy_xdit.comfy_types.installation import host_comfyui
    from comfy_xdit.comfy_types.model.twin import build_twin
    from comfy_xdit.protocol.spec import ModelSpec
    from worker.transformer.comfyui import ComfyUITransformer

    groups = RankGroups(Alone(), ONE, torch.device("cpu"))

    def in_ranks(path: Path) -> None:
        """All that is asked before memory is taken."""
        model = ComfyUITransformer(ModelSpec.of(path, "transformer", comfyui=host_comfyui()), groups, ONE)
        model.describe()
        _ = model.loras, model.nbytes

    return {
        "choice": lambda path: spec_of(path, "default"),
        "twin": lambda path: build_twin(path, torch.float32),
        "ranks": in_ranks,
    }


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "fuzz.safetensors"


@examples(EXAMPLES)
@given(data=st.data())
def test_changed_files_of_models(readers: dict[str, Reader], files: dict[str, Shapes], file: Path, data):
    name = data.draw(st.sampled_from(sorted(files)))
    tensors = data.draw(changed(files[name]))
    with warnings.catch_warnings(action="ignore"):  # of torch, about sizes of nothing
        check_model(file, readers[data.draw(st.sampled_from(sorted(readers)))], tensors)
