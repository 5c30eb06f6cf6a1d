"""Models and worker groups that many tests share. Each rank computes with one thread."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from torch import nn

os.environ["XDIT_OMP_NUM_THREADS"] = "1"


@dataclass(frozen=True)
class TinyModel:
    """A random model: its family, its diffusers module (the reference), and both file formats."""

    family: Any
    config: dict[str, Any]
    module: nn.Module
    folder: Path
    file: Path


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TinyModel]:
    """One tiny model per architecture, written as a diffusers folder and as a single file."""
    from tests import tiny
    from worker.models import FAMILIES

    sd3, flux = FAMILIES
    root = tmp_path_factory.mktemp("models")
    models = {}
    for name, family, config in (
        ("sd3", sd3, tiny.SD3_CONFIG),
        ("sd3.5-medium", sd3, tiny.SD35_CONFIG),
        ("flux", flux, tiny.FLUX_CONFIG),
    ):
        module = tiny.build(family, config)
        module.save_pretrained(root / name)
        file = tiny.write_native(family, module, config, root / f"{name}.safetensors")
        models[name] = TinyModel(family, config, module, root / name, file)
    return models


@pytest.fixture(autouse=True, scope="session")
def _no_group_survives() -> Iterator[None]:
    """Every group the tests started is closed at the end, so that no rank outlives the run."""
    yield
    from comfy_xdit.group import running_groups

    for group in running_groups():
        group.close()
