"""Ranks that share one device. Needs a GPU, or XDIT_GPU_TESTS=cpu."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from comfy_xdit.ranks.registry import running_groups
from tests.gpu.device import DEVICE, HAS_GPU, ON_CPU, WHY_NOT
from worker.parallel.staged import STAGED

FOLDER = Path(__file__).parent


def pytest_report_header() -> str:
    """For docs/gpu.md."""
    return (
        f"device: {torch.cuda.get_device_name(DEVICE) if HAS_GPU else 'CPU ranks'}, torch {torch.__version__}"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All of this folder are marked; none runs where there is nothing to run on."""
    for item in items:
        if FOLDER in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not HAS_GPU and not ON_CPU:
                item.add_marker(pytest.mark.skip(reason=WHY_NOT))


@pytest.fixture(autouse=True, scope="session")
def _as_many_threads_as_a_rank() -> None:
    """A CPU's products of halves round in another order on more."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def _staged_exchanges() -> Iterator[None]:
    """Ranks that share a GPU exchange through main memory; those of other tests do not."""
    _close_all()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(STAGED, "1")
        yield
        _close_all()


def _close_all() -> None:
    for group in running_groups():
        group.close()
