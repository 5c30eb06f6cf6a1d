"""What is wrong with a diffusers folder, or asked of its model, is said by name before it is computed."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.layouts import LAYOUTS
from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.spec import ModelSpec
from comfy_xdit.ranks.registry import worker_group
from comfy_xdit.remote.model import RemoteModel
from tests.folder_cases import FOLDERS, drawn
from worker.models.folders.classes import CLASSES, of_folder
from worker.models.folders.schedule import sampling_of
from worker.models.plans.diffusers import PLANS
from worker.parallel.groups import Degrees, RankGroups
from worker.transformer.transformer import Transformer


def _opened(folder: Path) -> Transformer:
    """As a rank opens it, in this process."""
    groups = RankGroups(SimpleNamespace(rank=0, world_size=1), Degrees(1, 1, 1, 1), torch.device("cpu"))
    return Transformer(ModelSpec.of(folder, "transformer"), groups, groups.degrees)


def _written(folder: Path, name: str) -> Path:
    FOLDERS[name].write(folder)
    return folder


def _change(file: Path, **words) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | words))


# File in the folder, what becomes of it (None: it goes), and what is said.
DAMAGES = [
    ("scheduler/scheduler_config.json", None, r"scheduler_config\.json is missing"),
    ("scheduler/scheduler_config.json", "{", r"scheduler_config\.json is damaged"),
    ("scheduler/scheduler_config.json", {"_class_name": "Pickle"}, "which is no class of this diffusers"),
    ("scheduler/scheduler_config.json", {"prediction_type": "trigflow"}, "prediction_type 'trigflow'"),
    ("scheduler/scheduler_config.json", {"num_train_timesteps": 10}, "num_train_timesteps 10"),
    ("vae/config.json", None, r"vae/config\.json is missing"),
    ("vae/config.json", {"z_dim": None}, "how many channels a latent has"),
    ("transformer/config.json", {"num_layers": 10**9}, "no known model has more than 200"),
    ("transformer/config.json", {"text_dim": 10**12}, "no known model has more than"),
    ("transformer/config.json", {"num_layers": "many"}, "looks like wan"),
    ("transformer/config.json", {"text_dim": 48}, "has shape"),
    ("transformer/config.json", {"patch_size": [1, 2, 0]}, r"says patch_size \[1, 2, 0\]"),
    ("transformer/config.json", {"in_channels": None}, "no such model has"),
    ("transformer/config.json", {"num_attention_heads": "4"}, "no such model has"),
    ("vae/config.json", {"latents_mean": 3}, "no such model has"),
    ("transformer/config.json", {"num_layers": 3}, "lacks the tensor blocks.2"),
    (
        "model_index.json",
        {"transformer_2": ["diffusers", "WanTransformer3DModel"]},
        "Wan 2.2 with two models",
    ),
    ("model_index.json", {"expand_timesteps": True}, "a time for each token"),
]


@pytest.mark.parametrize(("file", "change", "said"), DAMAGES)
def test_a_folder_that_is_not_whole(tmp_path, file, change, said):
    folder = _written(tmp_path, "Wan 2.1 T2V")
    if change is None:
        (folder / file).unlink()
    elif isinstance(change, str):
        (folder / file).write_text(change)
    else:
        _change(folder / file, **change)
    with pytest.raises(InvalidInput, match=said):
        _opened(folder)


def test_a_first_frame_in_place_of_noise_is_refused(tmp_path):
    folder = _written(tmp_path, "HunyuanVideo")
    _change(folder / "transformer" / "config.json", image_condition_type="token_replace")
    with pytest.raises(InvalidInput, match="token_replace"):
        _opened(folder)


# Model, latent's shape, what a conditioning has otherwise, and what is said.
CALLS = [
    ("DiT-XL", (2, 4, 8, 10), {}, "squares only"),
    ("DiT-XL", (2, 4, 8, 8), {"class_labels": torch.tensor([[3], [9]])}, "not all among the 9"),
    ("DiT-XL", (2, 4, 8, 8), {"class_labels": None}, "make it with xDiT Class Label"),
    ("Latte", (2, 4, 3, 8, 8), {}, "has 3 frames, and this Latte draws 5"),
    ("CogVideoX", (2, 4, 3, 10, 6), {"context": drawn(2, 4, 32, seed=1)}, "takes 5, padded"),
    ("Wan 2.1 I2V", (2, 36, 3, 8, 8), {"context": drawn(2, 9, 32, seed=1)}, "takes 512, padded"),
    ("HunyuanDiT", (2, 4, 8, 8), {"context": drawn(2, 9, 32, seed=1)}, "context has 9 tokens"),
    ("SANA", (2, 4, 8, 8), {"context": drawn(2, 7, 31, seed=1)}, "context is 31 wide, sana takes 32"),
    ("SANA", (2, 4, 8, 8), {"reference": drawn(2, 4, seed=1)}, "carries reference, which sana"),
    ("SANA", (2, 4, 3, 8, 8), {}, r"sana takes \(batch, 4, height, width\)"),
    ("Wan 2.1 I2V", (2, 16, 3, 8, 8), {}, r"wan takes \(batch, 36, frames, height, width\)"),
    ("ConsisID", (2, 8, 3, 8, 8), {"id_cond": None}, "a node that encodes a face"),
]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """written(name) -> a folder, once."""
    found = {}

    def get(name: str) -> Path:
        if name not in found:
            found[name] = _written(tmp_path_factory.mktemp("folder"), name)
        return found[name]

    return get


@pytest.mark.parametrize(("name", "shape", "changes", "said"), CALLS)
def test_a_call_that_the_class_has_no_place_for(written, name, shape, changes, said):
    given = FOLDERS[name].conditions(2) | changes
    with pytest.raises(InvalidInput, match=said):
        _opened(written(name)).check(drawn(*shape, seed=1), given)


def test_a_group_survives_what_is_refused(written):
    folder, case = written("Latte"), FOLDERS["Latte"]
    remote = RemoteModel(ModelSpec.of(folder, "transformer"), LAYOUTS["1 rank"])
    remote.load()
    pids = worker_group(remote.parallel).pids
    times, given = torch.tensor([5.0, 6.0]), case.conditions(2)
    with pytest.raises(InvalidInput, match="has 3 frames"):
        remote.denoise(drawn(2, 4, 3, 8, 8, seed=1), times, given)
    assert remote.denoise(case.latent(), times, given).isfinite().all()
    assert worker_group(remote.parallel).pids == pids


def test_every_row_has_a_plan_and_no_shapes_are_asked(tmp_path):
    assert set(CLASSES) <= set(PLANS)
    assert of_folder(tmp_path, {}) is None


def test_old_folders_name_one_class_for_two_models(tmp_path):
    folder = _written(tmp_path, "PixArt-Sigma")
    _change(
        folder / "transformer" / "config.json", _class_name="Transformer2DModel", norm_type="ada_norm_single"
    )
    assert _opened(folder).describe()["family"] == "pixart"


def test_a_shift_by_the_size_of_the_picture_is_that_of_large_ones():
    words = {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "use_dynamic_shifting": True,
        "max_shift": 1.15,
    }
    sampling = sampling_of(words, Path("scheduler_config.json"))
    assert sampling.shift == pytest.approx(3.158, abs=1e-3)
    # e^mu / (e^mu + 1 / t - 1), as FLUX.1's pipelines write it
    half = sampling.shift / (sampling.shift + 1)
    assert float(sampling.sigma(torch.tensor(0.5))) == pytest.approx(half)
