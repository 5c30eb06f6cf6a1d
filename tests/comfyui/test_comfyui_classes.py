"""ComfyUI's own classes in the ranks: every one of this ComfyUI, against itself in this process."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from comfy_xdit.ranks.registry import running_groups
from comfy_xdit.remote.model import RemoteModel
from tests.comfyui import class_ranks
from tests.comfyui.families_table import ABSENT, FamiliesTable
from tests.comfyui.inputs import layout, relative_l2
from tests.comfyui.tiny_classes import why_no_file, write
from worker.models.comfyui.cases import CASES, Draw
from worker.models.plans.comfyui import REASONS

LAYOUTS = {
    "CFG 2": {"cfg_parallel_degree": 2},
    "sharded 2": {"data_parallel_degree": 2, "shard_weights": True},
    "ulysses 2": {"ulysses_degree": 2},
    "ring 2": {"ring_degree": 2},
}
# Tokens through the loader node: some of each way a plan can be. All of them: class_ranks.py.
THROUGH_THE_NODE = ("flux2", "hunyuan video", "ltxv", "qwen edit", "sd3.5 medium", "wan vace", "z-image")
BY_FILE = ("1 rank, fp32", "1 rank, bf16", "CFG 2", "sharded 2")  # columns that need a file of the class
SPREAD = 1e-5  # relative L2 of a call
DEAF = 1e-4  # at least, once ranks leave out each other's keys
# The first test of several ranks waits for what four of them measure of all classes: minutes.
pytestmark = [pytest.mark.usefixtures("threads_of_a_rank"), pytest.mark.timeout(1800)]
MOST_WHOLE = 2  # classes of a version that Ulysses and Ring do not spread


@pytest.fixture(scope="module", autouse=True)
def forced(comfyui):
    """SD3 and FLUX.1 too."""
    from comfy_xdit.comfy_types.choice import FORCED

    with pytest.MonkeyPatch.context() as environment:
        environment.setenv(FORCED, "comfyui")
        yield


@pytest.fixture(scope="module")
def files(comfyui) -> Any:
    """Name of a case -> its file, written once."""
    written: dict[str, str] = {}

    def file(name: str) -> str:
        if name not in written:
            written[name] = write(name, comfyui.models / "diffusion_models")
        return written[name]

    return file


@pytest.fixture(scope="module", params=LAYOUTS)
def spread_over(request) -> str:
    """Grouped by pytest, so that each layout's ranks start once."""
    return request.param


@pytest.fixture(scope="module")
def numbers(comfyui) -> dict[str, Any]:
    """Of every case over ranks and deaf, without a loader: by case and layout."""
    return class_ranks.measured()


@pytest.fixture(scope="module")
def table(comfyui) -> Any:
    """Written as a page where the environment names one and every test here has run."""
    version = importlib.import_module("comfyui_version").__version__
    table = FamiliesTable(version)
    for name in filter(why_no_file, CASES):
        for column in BY_FILE:
            table.record(name, column, why_no_file(name))
    yield table
    page = os.environ.get("XDIT_FAMILIES_PAGE")
    if page and table.is_whole(list(CASES)):
        table.write(Path(page))


def models(comfyui, run_node, file: str, degrees: dict[str, Any], dtype: str = "default") -> SimpleNamespace:
    import comfy.sd

    path = str(comfyui.models / "diffusion_models" / file)
    options = {"dtype": torch.bfloat16} if dtype == "bf16" else {}
    stock = comfy.sd.load_diffusion_model(path, model_options=options)
    # 0.3.64 leaves ACE-Step in training, where dropout makes two equal calls differ by 3e-2.
    stock.model.diffusion_model.eval()
    (ours,) = run_node(
        "XDiTLoadDiffusionModel", unet_name=file, weight_dtype=dtype, parallel=layout(**degrees)
    )
    return SimpleNamespace(stock=stock, ours=ours)


def call(model: Any, name: str, batch: int) -> list[torch.Tensor]:
    """One call of the transformer, as BaseModel makes it."""
    args, kwargs = CASES[name].call(Draw(batch))
    with torch.inference_mode():
        out = model.model.diffusion_model(*args, **kwargs, transformer_options=options())
    return [out] if isinstance(out, torch.Tensor) else list(out)


def options() -> dict[str, Any]:
    """What samplers and nodes put there, and classes read."""
    scale = {"scale_x": 1.1, "scale_y": 0.9, "scale_t": 1.2}
    return {
        "rope_options": scale | {"shift_x": 1.0, "shift_y": 2.0, "shift_t": 0.5},
        "sigmas": torch.tensor([0.5]),
        "sample_sigmas": torch.tensor([1.0, 0.5, 0.0]),
        "cond_or_uncond": [0],
    }


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", ["default", "bf16"])
def test_one_rank_is_bit_equal_to_stock(comfyui, run_node, files, table, dtype, name):
    column = f"1 rank, {'bf16' if dtype == 'bf16' else 'fp32'}"
    pair = models(comfyui, run_node, files(name), {}, dtype)

    batch = CASES[name].batches[0]
    for actual, wanted in zip(call(pair.ours, name, batch), call(pair.stock, name, batch), strict=True):
        assert wanted.isfinite().all() and wanted.norm() > 0, "the tiny model says nothing"
        assert actual.dtype == wanted.dtype and torch.equal(actual, wanted)
    table.record(name, column, 0.0)


def test_a_class_that_keeps_what_it_saw_sees_other_pictures(comfyui, run_node, files):
    """Of the same prompt and size; a call's tensors may lie where those of the call before lay."""
    name = "hidream o1 edit"
    pair = models(comfyui, run_node, files(name), {})
    for seed in (1, 1, 2, 3, 1):
        args, kwargs = CASES[name].call(Draw(1, seed))
        pair.stock.model.diffusion_model.clear_kv_cache()
        with torch.inference_mode():
            actual, wanted = (
                model.model.diffusion_model(*args, **kwargs, transformer_options=options())
                for model in (pair.ours, pair.stock)
            )
        assert relative_l2(actual, wanted) <= SPREAD


@pytest.mark.parametrize("name", CASES)
def test_several_ranks_equal_stock(comfyui, run_node, files, table, spread_over, name):
    if spread_over in class_ranks.LAYOUTS and name not in THROUGH_THE_NODE:
        pytest.skip("compared without a loader")
    pair = models(comfyui, run_node, files(name), LAYOUTS[spread_over])

    for batch in CASES[name].batches:
        for actual, wanted in zip(call(pair.ours, name, batch), call(pair.stock, name, batch), strict=True):
            difference = relative_l2(actual, wanted)
            assert difference <= SPREAD
            table.record(name, spread_over, difference)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("layout", class_ranks.LAYOUTS)
def test_tokens_over_ranks_are_those_on_one(numbers, table, layout, name):
    number = numbers[name][layout]
    table.record(name, layout, number)
    if number == ABSENT:
        pytest.skip(number)
    if isinstance(number, str):  # why not: another test counts them
        assert CASES[name].name in REASONS, number
    else:
        assert number <= SPREAD


@pytest.mark.parametrize("name", CASES)
def test_without_other_ranks_keys_a_picture_is_another(numbers, table, name):
    number = numbers[name]["deaf"]
    table.record(name, "deaf", number)
    if isinstance(number, str):
        pytest.skip(number)
    assert number >= DEAF


def test_few_classes_keep_their_tokens_whole(numbers):
    whole = {
        CASES[name].name
        for name, row in numbers.items()
        if isinstance(row["ulysses 2"], str) and row["ulysses 2"] != ABSENT
    }
    assert len(whole) <= MOST_WHOLE, whole


# ---------------------------------------------------------------------- whole runs, through stock nodes

# Of each the conditioning's width, what else it brings, and the latent (B, C, [T,] H, W).
RUNS = {
    "wan t2v": (40, {}, (1, 16, 3, 10, 14)),
    "qwen image": (40, {}, (1, 16, 1, 10, 14)),
    "z-image": (40, {}, (1, 16, 10, 14)),
    "flux2": (40, {"pooled_output": 24}, (1, 128, 5, 7)),
    "hunyuan video": (40, {"pooled_output": 24}, (1, 16, 3, 10, 14)),
    "chroma": (40, {"pooled_output": 24}, (1, 16, 10, 14)),
    "ltxav": (80, {}, ((1, 16, 3, 5, 7), (1, 8, 9, 16))),  # a video and its sound
}


def conditioning(seed: int, width: int, more: dict[str, int]) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    extra = {name: torch.randn(1, size, generator=generator) for name, size in more.items()}
    return [[torch.randn(1, 11, width, generator=generator), extra]]


def sampled(run_node, model: Any, name: str) -> list[torch.Tensor]:
    width, more, shapes = RUNS[name]
    if isinstance(shapes[0], tuple):
        nested = importlib.import_module("comfy.nested_tensor").NestedTensor
        empty = nested([torch.zeros(shape) for shape in shapes])
    else:
        empty = torch.zeros(shapes)
    (latent,) = run_node(
        "KSampler", model=model, seed=7, steps=3, cfg=3.0, sampler_name="euler", scheduler="simple",
        denoise=1.0, positive=conditioning(1, width, more), negative=conditioning(2, width, more),
        latent_image={"samples": empty},
    )  # fmt: skip
    return getattr(latent["samples"], "tensors", [latent["samples"]])


@pytest.mark.parametrize("name", RUNS)
def test_a_run_of_ksampler_is_stocks(comfyui, run_node, files, name):
    pair = models(comfyui, run_node, files(name), {})

    actual, wanted = (sampled(run_node, model, name) for model in (pair.ours, pair.stock))
    assert len(actual) == len(wanted) and all(map(torch.equal, actual, wanted))


@pytest.mark.parametrize("name", RUNS)
def test_an_interrupt_ends_a_run_and_the_next_is_as_before(comfyui, run_node, files, monkeypatch, name):
    import comfy.model_management as management

    ours, denoise, calls = models(comfyui, run_node, files(name), {}).ours, RemoteModel.denoise, []
    before, pids = sampled(run_node, ours, name), [group.pids for group in running_groups()]

    def stopping(self: RemoteModel, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        management.interrupt_current_processing(len(calls) == 2)
        return denoise(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(management.InterruptProcessingException):
        patch.setattr(RemoteModel, "denoise", stopping)
        sampled(run_node, ours, name)

    assert len(calls) == 2
    assert all(map(torch.equal, sampled(run_node, ours, name), before))
    assert [group.pids for group in running_groups()] == pids


@pytest.mark.parametrize("sampler", ["KSampler", "XDiTSampler"])
def test_an_empty_latent_gets_the_size_of_the_model(comfyui, run_node, files, sampler):
    """ComfyUI 0.33's says its ratio to the picture, which is not that of Flux.2."""
    pair = models(comfyui, run_node, files("flux2"), {})
    (latent,) = run_node("EmptyLatentImage", width=224, height=160, batch_size=1)
    width, more, _ = RUNS["flux2"]
    common = {
        "seed": 7, "steps": 2, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0,
        "positive": conditioning(1, width, more), "negative": conditioning(2, width, more),
        "latent_image": latent,
    }  # fmt: skip

    (wanted,) = run_node("KSampler", model=pair.stock, **common)
    answer = run_node(sampler, model=pair.ours, **common)

    (actual,) = answer["result"] if isinstance(answer, dict) else answer
    assert set(actual) == set(wanted)
    assert torch.equal(actual["samples"], wanted["samples"])


# HiDream O1 keeps keys of the prompt, which are others with other weights.
@pytest.mark.parametrize(
    ("name", "where"),
    [("wan t2v", ""), ("z-image", ""), ("ltxav", ""), ("hidream o1", "layers.0.self_attn.v_proj")],
)
def test_a_lora_on_classes_own_names_is_stocks(comfyui, run_node, files, name, where):
    """A stock LoRA node, and off again; the file's names are the class's own."""
    pair = models(comfyui, run_node, files(name), {})
    weights = pair.ours.model.diffusion_model.state_dict()
    key = next(
        key
        for key, tensor in weights.items()
        if where in key and key.endswith("weight") and tensor.ndim == 2 and min(tensor.shape) > 8
    )
    rows, columns = weights[key].shape
    generator = torch.Generator().manual_seed(5)
    module = key.removesuffix(".weight")
    lora = {
        f"diffusion_model.{module}.lora_up.weight": torch.randn(rows, 4, generator=generator),
        f"diffusion_model.{module}.lora_down.weight": torch.randn(4, columns, generator=generator),
    }
    save_file(lora, comfyui.models / "loras" / f"{name.replace(' ', '_')}_lora.safetensors")
    plain = call(pair.ours, name, 1)

    patched = []
    for model in (pair.ours, pair.stock):
        (changed,) = run_node(
            "LoraLoaderModelOnly", model=model, strength_model=0.5,
            lora_name=f"{name.replace(' ', '_')}_lora.safetensors",
        )  # fmt: skip
        changed.patch_model()
        changed.pre_run()
        patched.append(call(changed, name, 1))
        changed.unpatch_model()
    assert relative_l2(patched[0][0], patched[1][0]) <= SPREAD
    assert relative_l2(patched[0][0], plain[0]) > 1e-3
