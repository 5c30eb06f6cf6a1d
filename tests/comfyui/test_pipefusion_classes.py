"""PipeFusion with ComfyUI's own classes: a run in the ranks against the class in one process."""

from __future__ import annotations

import inspect
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from comfy_xdit.protocol import proofs
from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.messages import Sample
from comfy_xdit.protocol.parallel import ParallelConfig
from comfy_xdit.protocol.spec import ModelSpec
from comfy_xdit.remote.model import RemoteModel
from tests.comfyui.inputs import layout, relative_l2
from tests.comfyui.tiny_classes import module_of, write
from worker.models.comfyui.cases import CASES, Draw

SIGMAS, CFG, ALL = torch.tensor([1.0, 0.8, 0.5, 0.2, 0.0]), 2.5, 99
EXACT, DRIFT = 1e-6, 0.1
TWO = (
    "flux", "chroma", "sd3", "auraflow", "pixart", "hunyuan dit", "hunyuan video", "wan t2v", "qwen image",
    "ltxv",
)  # fmt: skip
FOUR = ("flux", "hunyuan video")  # which have four blocks
# Later ones attend apart to guides of their own strength, at places counted in the whole picture.
UNTIL_LTXV = (0, 3, 64)
MASKED = ("hunyuan dit", "ltxv")  # whose prompts come with a mask of one length
LAYOUTS = [
    pytest.param({"pipefusion_degree": stages, **more}, name, id=f"{name} {stages} {''.join(more)}".strip())
    for stages, more, names in (
        (2, {}, TWO),
        (4, {}, FOUR),
        (2, {"ulysses_degree": 2}, FOUR),
        (2, {"cfg_parallel_degree": 2}, ("wan t2v",)),
    )
    for name in names
]


@pytest.fixture(scope="module")
def host(comfyui) -> Any:
    from comfy_xdit.comfy_types.installation import host_comfyui

    return replace(host_comfyui(), switches=())


@pytest.fixture(scope="module")
def files(comfyui) -> Any:
    folder = comfyui.models / "diffusion_models"
    return lambda name: folder / write(name, folder)


def remote(host: Any, file: Path, degrees: dict[str, int], warmup: int = ALL) -> RemoteModel:
    layout = ParallelConfig(**degrees, warmup_steps=warmup)
    layout = replace(layout, devices=("cpu",) * layout.world_size)
    return RemoteModel(ModelSpec.of(file, "transformer", comfyui=host), layout)


def sides(name: str, module: torch.nn.Module) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    """Noise, and the negative and positive conditions, of different length where the class allows it."""
    names = list(inspect.signature(getattr(module, "_forward", module.forward)).parameters)
    found = []
    for seed, tokens in ((2, 7), (3, 11)):
        (x, _, *args), more = CASES[name].call(Draw(1, seed))
        given = dict(zip(names[2:], args, strict=False)) | more
        given.pop("control", None)
        if name == "hunyuan video":
            given.pop("attention_mask")  # which the class takes of one row only
        if name not in MASKED:
            given["context"] = given["context"][:, :tokens]
        found.append(given)
    return x, found


def plain(name: str, module: torch.nn.Module) -> torch.Tensor:
    """Euler's method with guidance, the class itself called whole."""
    x, conditions = sides(name, module)
    with torch.inference_mode():
        for sigma, following in pairwise(SIGMAS):
            negative, positive = (
                module(x, sigma[None] * 1000, **given, transformer_options={}) for given in conditions
            )
            x = x + (following - sigma) * (negative + (positive - negative) * CFG)
    return x


def request(model: RemoteModel, name: str, module: torch.nn.Module) -> Sample:
    noise, given = sides(name, module)
    negative, positive = (side | {"transformer_options": {}} for side in given)
    return Sample(
        model.spec, "euler", SIGMAS, torch.zeros_like(noise), noise, CFG, positive, negative, SIGMAS * 1000
    )


@pytest.mark.parametrize(("degrees", "name"), LAYOUTS)
def test_a_run_that_is_all_warm_up_is_that_of_one_process(host, files, degrees, name):
    module, _ = module_of(CASES[name])
    model = remote(host, files(name), degrees)
    if name == "ltxv" and tuple(map(int, host.version.split("."))) > UNTIL_LTXV:
        with pytest.raises(InvalidInput, match=r"ltxv guide strength.*made of none of its tokens"):
            model.load()
        return

    wanted = plain(name, module)

    assert relative_l2(model.sample(request(model, name, module)), wanted) <= EXACT


def test_patches_that_see_older_keys_drift_a_little(host, files):
    module, _ = module_of(CASES["wan t2v"])
    model = remote(host, files("wan t2v"), {"pipefusion_degree": 2}, warmup=1)

    off = relative_l2(model.sample(request(model, "wan t2v", module)), plain("wan t2v", module))

    assert EXACT < off < DRIFT


def test_a_class_that_cannot_be_cut_is_refused_by_name_and_reason(host, files):
    with pytest.raises(InvalidInput, match=r"pipefusion_degree 2 cannot spread .*NextDiT.* 2 regions"):
        remote(host, files("z-image"), {"pipefusion_degree": 2}).load()


def test_more_stages_than_blocks_are_refused(host, files):
    with pytest.raises(InvalidInput, match="pipefusion_degree 4 is more than the 2 blocks"):
        remote(host, files("wan t2v"), {"pipefusion_degree": 4}).load()


def test_stages_are_proven_as_tokens_are(host):
    proven = {(proof.name, proof.method) for proof in proofs.known(host) if proof.plan is not None}

    assert ("Flux", proofs.PATCHES) in proven and ("HunYuanDiT", proofs.PATCHES) in proven
    assert ("HunyuanVideo", proofs.TOKENS) in proven, "of stages that spread their tokens both"


def test_xdit_sampler_runs_a_class_in_stages_as_ksampler_runs_it_whole(comfyui, run_node, files):
    """All steps warm-up; and a node between them that says something to the class."""
    if "ScaleROPE" not in comfyui.mappings:
        pytest.skip("this ComfyUI has no ScaleROPE")
    parallel = layout(pipefusion_degree=2, warmup_steps=ALL)
    file = files("chroma").name
    (stock,) = run_node("UNETLoader", unet_name=file, weight_dtype="default")
    (ours,) = run_node("XDiTLoadDiffusionModel", unet_name=file, weight_dtype="default", parallel=parallel)

    latents = []
    for model, node in ((ours, "XDiTSampler"), (stock, "KSampler")):
        (scaled,) = run_node(
            "ScaleROPE", model=model, scale_x=1.1, shift_x=0.0, scale_y=0.9, shift_y=1.0, scale_t=1.0,
            shift_t=0.0,
        )  # fmt: skip
        (latent,) = run_node(
            node, model=scaled, seed=7, steps=3, cfg=3.0, sampler_name="euler", scheduler="simple",
            denoise=1.0, positive=conditioning(1, 11), negative=conditioning(2, 7),
            latent_image={"samples": torch.zeros(1, 16, 10, 14)},
        )  # fmt: skip
        latents.append(latent["samples"])

    assert relative_l2(*latents) <= 1e-5


def conditioning(seed: int, tokens: int) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    pooled = torch.randn(1, 24, generator=generator)
    return [[torch.randn(1, tokens, 40, generator=generator), {"pooled_output": pooled}]]
