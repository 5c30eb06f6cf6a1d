"""Models and worker groups that many tests share. Each rank computes with one thread."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ["XDIT_OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One tiny model per architecture, written as a diffusers folder and as a single file."""
    from tests import tiny

    return tiny.write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Path]]:
    """folders(name) -> a transformer of tests.folder_cases and its pipeline's folder, written once."""
    import torch

    from tests.folder_cases import FOLDERS

    root, written = tmp_path_factory.mktemp("folders"), {}

    def get(name: str) -> tuple[Any, Path]:
        if name not in written:
            folder = root / name.replace(" ", "_")
            folder.mkdir()
            with torch.inference_mode(False):
                written[name] = FOLDERS[name].write(folder), folder
        return written[name]

    return get


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes the times that this user's machine remembers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDIT_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True, scope="session")
def _no_group_survives() -> Iterator[None]:
    """Every group the tests started is closed at the end, so that no rank outlives the run."""
    yield
    from comfy_xdit.ranks.registry import running_groups

    for group in running_groups():
        group.close()


@pytest.fixture(scope="session")
def models_table() -> Iterator[Any]:
    """Of docs/models.md, which is written where XDIT_MODELS_PAGE names it."""
    from tests.models_table import ModelsTable

    table = ModelsTable()
    yield table
    if page := os.environ.get("XDIT_MODELS_PAGE"):
        table.write(Path(page))
