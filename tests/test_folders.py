"""Every family that is read from a diffusers folder, against plain diffusers as its pipelines call it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.layouts import LAYOUTS, PIPELINES, SHARDED
from benchmarks.parity import PER_CALL
from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.messages import Sample
from comfy_xdit.protocol.spec import ModelSpec
from comfy_xdit.remote import sigmas_of
from comfy_xdit.remote.model import RemoteModel
from tests import tiny
from tests.folder_cases import FOLDERS

CALLS = {name: LAYOUTS[name] for name in ("1 rank", "Ulysses 2", "Ring 2", "CFG 2", "data 2")}
CALLS["Ulysses 2, sharded"] = SHARDED["Ulysses 2, sharded"]
TIMES = torch.tensor([731.0, 12.0])


def compact(name, values):
    """Parametrised, under names that -k takes."""
    return pytest.mark.parametrize(name, values, ids=lambda value: value.replace(" ", ""))


# Layouts outermost: another one is other processes.
@compact("name", FOLDERS)
@compact("layout", CALLS)
def test_a_call_is_plain_diffusers(folders, name, layout, models_table):
    case, (module, folder) = FOLDERS[name], folders(name)
    x, given = case.latent(), case.conditions(2)
    remote = RemoteModel(ModelSpec.of(folder, "transformer"), CALLS[layout])

    actual = remote.denoise(x, TIMES, given)

    expected = case.reference(module, x, TIMES, given)
    assert actual.shape == expected.shape == case.shape
    error = tiny.relative_l2(actual, expected)
    assert error <= PER_CALL
    models_table.record(name, layout, error)


def _row(value: Any, row: int) -> Any:
    if isinstance(value, dict):
        return {name: _row(part, row) for name, part in value.items()}
    return [_row(one, row) for one in value] if isinstance(value, list) else value[row : row + 1]


def _run(folder, case, layout) -> torch.Tensor:
    """Three guided steps in the ranks; row 0 of the case's conditions is positive."""
    remote = RemoteModel(ModelSpec.of(folder, "transformer"), layout)
    sampling, given = remote.described().sampling, case.conditions(2)
    sigmas, noise = sigmas_of(sampling, "sgm_uniform", 3), case.latent(seed=4, batch=1)
    request = Sample(
        remote.spec, "euler", sigmas, torch.zeros_like(noise), noise, 3.0, _row(given, 0), _row(given, 1),
        sampling.timesteps(sigmas), prediction=sampling.prediction, most=sampling.begins_at_most(sigmas),
    )  # fmt: skip
    return remote.sample(request)


STAGES = {name: PIPELINES[name] for name in ("PipeFusion 2", "PipeFusion 2 x Ulysses 2")}
# Channels beside a latent are the host's to add, step by step: PipeFusion runs no such loop.
PATCHED = [name for name, case in FOLDERS.items() if case.stages and not case.beside]


@compact("name", PATCHED)
@compact("layout", STAGES)
def test_a_run_through_stages_is_one_ranks(folders, name, layout, models_table):
    case, (_, folder) = FOLDERS[name], folders(name)
    error = tiny.relative_l2(_run(folder, case, STAGES[layout]), _run(folder, case, LAYOUTS["1 rank"]))
    assert error <= PER_CALL
    if layout == "PipeFusion 2":
        models_table.record(name, layout, error)


@compact("name", [name for name, case in FOLDERS.items() if not case.stages])
def test_what_cannot_be_cut_into_stages_is_refused(folders, name, models_table):
    remote = RemoteModel(ModelSpec.of(folders(name)[1], "transformer"), PIPELINES["PipeFusion 2"])
    with pytest.raises(InvalidInput, match="pipefusion_degree") as refused:
        remote.load()
    models_table.record(name, "PipeFusion 2", str(refused.value))


def test_parts_that_diffusers_keeps_in_fp32_stay_so(folders):
    """Wan's norms and modulation, and a call as plain diffusers computes it from a bf16 folder."""
    from diffusers import WanTransformer3DModel

    case, (_, folder) = FOLDERS["Wan 2.1 T2V"], folders("Wan 2.1 T2V")
    plain = WanTransformer3DModel.from_pretrained(folder / "transformer", dtype=torch.bfloat16)
    x, given = case.latent().bfloat16(), case.conditions(2)
    given = {name: value.bfloat16() for name, value in given.items()}
    expected = case.reference(plain, x, TIMES, given)
    for layout in ("1 rank", "Ulysses 2, sharded"):
        remote = RemoteModel(ModelSpec.of(folder, "transformer", "bf16"), CALLS[layout])
        assert tiny.relative_l2(remote.denoise(x, TIMES, given), expected) <= 1e-2
    # One rank does the very same.
    remote = RemoteModel(ModelSpec.of(folder, "transformer", "bf16"), CALLS["1 rank"])
    assert torch.equal(remote.denoise(x, TIMES, given), expected)


@compact("name", ["CogVideoX", "CogVideoX 1.5", "HunyuanDiT", "Latte"])
def test_the_table_of_noise_is_the_schedulers(folders, name):
    import diffusers

    words = dict(FOLDERS[name].scheduler)
    signal = getattr(diffusers, words.pop("_class_name"))(**words).alphas_cumprod.double()
    remote = RemoteModel(ModelSpec.of(folders(name)[1], "transformer"), LAYOUTS["1 rank"])
    sampling = remote.described().sampling

    expected = ((1 - signal) / signal).sqrt()[:-1]  # the last may be of noise alone
    assert torch.allclose(sampling.table[:-1].double(), expected, rtol=1e-4)
    wanted = {"v_prediction": "v"}.get(FOLDERS[name].scheduler.get("prediction_type"), "epsilon")
    assert sampling.prediction == wanted


def test_a_flow_is_shifted_as_the_folder_says(folders):
    for name, shift in (("Wan 2.1 T2V", 5.0), ("SANA", 3.0), ("HunyuanVideo", 7.0), ("Mochi", 1.0)):
        described = RemoteModel(ModelSpec.of(folders(name)[1], "transformer"), LAYOUTS["1 rank"]).described()
        assert (described.sampling.kind, described.sampling.shift) == ("flow", shift)


def test_latents_are_those_of_the_folders_vae(folders):
    told = {
        name: RemoteModel(ModelSpec.of(folders(name)[1], "transformer"), LAYOUTS["1 rank"]).described()
        for name in ("SANA", "Mochi", "CogVideoX 5B I2V")
    }
    assert (told["SANA"].latent.compression, told["SANA"].latent.scale) == (32, 0.41407)
    assert told["Mochi"].latent.mean == tuple(FOLDERS["Mochi"].vae["latents_mean"])
    assert (told["CogVideoX 5B I2V"].latent.frames, told["CogVideoX 5B I2V"].beside) == (4, 4)
