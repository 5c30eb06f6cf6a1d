"""Every family that is read from a diffusers folder, against plain diffusers as its pipelines call it."""

from __future__ import annotations

import pytest
import torch

from benchmarks.layouts import LAYOUTS, SHARDED
from benchmarks.parity import PER_CALL
from comfy_xdit.protocol.spec import ModelSpec
from comfy_xdit.remote.model import RemoteModel
from tests import tiny
from tests.folder_cases import FOLDERS

CALLS = {name: LAYOUTS[name] for name in ("1 rank", "Ulysses 2", "Ring 2", "CFG 2", "data 2")}
CALLS["Ulysses 2, sharded"] = SHARDED["Ulysses 2, sharded"]
TIMES = torch.tensor([731.0, 12.0])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """folders(name) -> the transformer and its pipeline's folder, written once."""
    root, written = tmp_path_factory.mktemp("folders"), {}

    def get(name):
        if name not in written:
            folder = root / name.replace(" ", "_")
            folder.mkdir()
            written[name] = FOLDERS[name].write(folder), folder
        return written[name]

    return get


# Layouts outermost: another one is other processes.
@pytest.mark.parametrize("name", FOLDERS, ids=lambda name: name.replace(" ", ""))
@pytest.mark.parametrize("layout", CALLS, ids=lambda name: name.replace(" ", ""))
def test_a_call_is_plain_diffusers(folders, name, layout):
    case, (module, folder) = FOLDERS[name], folders(name)
    x, given = case.latent(), case.conditions(2)
    remote = RemoteModel(ModelSpec.of(folder, "transformer"), CALLS[layout])

    actual = remote.denoise(x, TIMES, given)

    expected = case.reference(module, x, TIMES, given)
    assert actual.shape == expected.shape == case.shape
    assert tiny.relative_l2(actual, expected) <= PER_CALL
