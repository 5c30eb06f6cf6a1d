"""XDiTLoadCheckpoint: what CheckpointLoaderSimple gives of the same file, with its MODEL in the ranks."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from comfy_xdit.headless.format import api_of
from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.ranks.environment import ROOT
from comfy_xdit.ranks.registry import running_groups
from tests.comfyui.inputs import layout, relative_l2
from tests.comfyui.tiny_checkpoints import (
    CHECKPOINTS,
    MODEL,
    parts,
    randomised,
    save,
    write,
)

pytestmark = pytest.mark.usefixtures("threads_of_a_rank", "checkpoints")

PER_RUN = 1e-5  # relative L2 over ranks
PROMPTS = ("a red circle on a blue square", "")
# Of one rank: bit-equal in ComfyUI's own class; SD3 in plain dtypes is in diffusers', which sums otherwise.
IN_DIFFUSERS = {"sd3": PER_RUN}


@pytest.fixture(scope="module")
def files(checkpoints) -> Any:
    """Name of a checkpoint -> its file, written once."""
    written: dict[str, str] = {}

    def file(name: str) -> str:
        if name not in written:
            written[name] = write(name, checkpoints)
        return written[name]

    return file


def load(run_node, file: str, **degrees: Any) -> SimpleNamespace:
    """The file by ComfyUI's loader (`stock`) and by ours (`ours`): each with model, clip and vae."""

    def of(node: str, **inputs: Any) -> SimpleNamespace:
        model, clip, vae = run_node(node, ckpt_name=file, **inputs)
        return SimpleNamespace(model=model, clip=clip, vae=vae)

    ours = of("XDiTLoadCheckpoint", weight_dtype="default", parallel=layout(**degrees))
    return SimpleNamespace(stock=of("CheckpointLoaderSimple"), ours=ours)


def prompts(run_node, clip: Any) -> list[Any]:
    """CONDITIONINGs of a positive and a negative prompt; of a file without CLIP, random ones."""
    if clip is not None:
        return [run_node("CLIPTextEncode", clip=clip, text=text)[0] for text in PROMPTS]
    generator = torch.Generator().manual_seed(3)
    return [[[torch.randn(1, 7, 64, generator=generator), {}]] for _ in PROMPTS]


def sampled(run_node, model: Any, conditionings: list[Any], channels: int = 4, **inputs: Any) -> torch.Tensor:
    given = {
        "seed": 7, "steps": 3, "cfg": 3.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0,
        "latent_image": {"samples": torch.zeros(1, channels, 10, 14)},
    }  # fmt: skip
    positive, negative = conditionings
    node = inputs.pop("node", "KSampler")
    answer = run_node(node, model=model, positive=positive, negative=negative, **given | inputs)
    (latent,) = answer["result"] if isinstance(answer, dict) else answer
    return latent["samples"]


def equal(one: list[Any], other: list[Any]) -> bool:
    """Whether two CONDITIONINGs are."""
    ((context, options),), ((context_, options_),) = one, other
    same = options.keys() == options_.keys() and all(torch.equal(options[k], options_[k]) for k in options)
    return torch.equal(context, context_) and same


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_one_rank_draws_what_stock_draws(run_node, files, name):
    """From the text to the picture: prompts by its CLIP, steps in the rank, decoded by its VAE."""
    pair, channels = load(run_node, files(name)), CHECKPOINTS[name].channels

    conditionings = [prompts(run_node, one.clip) for one in (pair.ours, pair.stock)]
    assert all(map(equal, *conditionings))
    latents = [
        sampled(run_node, one.model, conditioning, channels)
        for one, conditioning in zip((pair.ours, pair.stock), conditionings, strict=True)
    ]
    assert latents[1].isfinite().all() and latents[1].std() > 0.01, "the tiny model says nothing"
    if name in IN_DIFFUSERS:
        assert relative_l2(*latents) <= IN_DIFFUSERS[name]
        return
    assert torch.equal(*latents)
    pictures = [
        run_node("VAEDecode", samples={"samples": latent}, vae=one.vae)[0]
        for one, latent in zip((pair.ours, pair.stock), latents, strict=True)
    ]
    assert torch.equal(*pictures) and pictures[0].std() > 0.01


def test_what_stands_around_the_model_says_what_it_predicts(run_node, files):
    """And without it the same model draws another picture."""
    drawn = {}
    for name in ("sdxl", "sdxl v", "sdxl edm"):
        pair = load(run_node, files(name))
        assert pair.ours.model.model.model_type == pair.stock.model.model.model_type
        drawn[name] = sampled(run_node, pair.ours.model, prompts(run_node, pair.ours.clip))

    assert relative_l2(drawn["sdxl v"], drawn["sdxl"]) > 0.01
    assert relative_l2(drawn["sdxl edm"], drawn["sdxl v"]) > 0.01


def test_a_norm_says_what_a_diffusion_model_alone_predicts(comfyui, run_node):
    """Stable Diffusion 2, by UNETLoader: its twin has no weights to tell it by."""
    import comfy.model_base

    tensors = {key.removeprefix(MODEL): tensor for key, tensor in parts("sd2")["model"].items()}
    norm = tensors["output_blocks.11.1.transformer_blocks.0.norm1.bias"]
    for scale, prediction in ((0.3, "V_PREDICTION"), (0.05, "EPS")):
        norm.copy_(torch.linspace(-scale, scale, len(norm)))
        save(tensors, comfyui.models / "diffusion_models" / f"sd2_{scale}.safetensors")
        inputs = {"unet_name": f"sd2_{scale}.safetensors", "weight_dtype": "default"}
        (stock,) = run_node("UNETLoader", **inputs)
        (ours,) = run_node("XDiTLoadDiffusionModel", **inputs, parallel=layout(1))

        said = getattr(comfy.model_base.ModelType, prediction)
        assert ours.model.model_type == stock.model.model_type == said
        assert torch.equal(*(sampled(run_node, model, prompts(run_node, None)) for model in (ours, stock)))


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3"])
@pytest.mark.parametrize(
    "degrees",
    [
        {"cfg_parallel_degree": 2},
        {"data_parallel_degree": 2},
        {"data_parallel_degree": 2, "shard_weights": True},
    ],
    ids=["cfg 2", "data 2", "sharded 2"],
)
def test_two_ranks_draw_what_stock_draws(run_node, files, name, degrees):
    pair, channels = load(run_node, files(name), **degrees), CHECKPOINTS[name].channels
    conditioning = prompts(run_node, pair.stock.clip)
    latent = {"latent_image": {"samples": torch.zeros(2, channels, 10, 14)}}

    pictures = [
        sampled(run_node, one.model, conditioning, channels, **latent) for one in (pair.ours, pair.stock)
    ]

    assert relative_l2(*pictures) <= PER_RUN


@pytest.mark.parametrize("degrees", [{"cfg_parallel_degree": 2}, {"data_parallel_degree": 2}], ids=str)
def test_frames_of_a_video_stay_together(run_node, files, degrees):
    """Five of them, with two prompts ten rows: a rank has all, as each frame sees the others."""
    pair = load(run_node, files("svd"), **degrees)
    video, picture = ({"latent_image": {"samples": torch.zeros(n, 4, 10, 14)}} for n in (5, 1))

    ours, stock = (
        sampled(run_node, one.model, prompts(run_node, None), **video) for one in (pair.ours, pair.stock)
    )

    assert relative_l2(ours, stock) <= PER_RUN
    alone = sampled(run_node, pair.stock.model, prompts(run_node, None), **picture)
    assert relative_l2(stock[:1], alone) > 0.01


@pytest.mark.parametrize(
    "degrees", [{"ulysses_degree": 2}, {"ring_degree": 2}, {"pipefusion_degree": 2}], ids=str
)
def test_what_needs_tokens_is_refused_for_a_u_net_by_name(run_node, files, degrees):
    pair = load(run_node, files("sdxl"))
    conditioning = prompts(run_node, pair.ours.clip)
    before, pids = sampled(run_node, pair.ours.model, conditioning), [g.pids for g in running_groups()]

    ((name, _),) = degrees.items()
    with pytest.raises(InvalidInput, match=rf"{name} 2.*it is a U-Net, which has no tokens.*cfg_parallel"):
        load(run_node, files("sd15"), **degrees)

    assert [g.pids for g in running_groups()] == pids
    assert torch.equal(sampled(run_node, pair.ours.model, conditioning), before)


@pytest.mark.parametrize("degrees", [{}, {"cfg_parallel_degree": 2}], ids=["1 rank", "cfg 2"])
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_a_stock_controlnet(run_node, files, name, degrees):
    """Its residuals go in, to the middle and out."""
    import comfy.cldm.cldm
    import comfy.controlnet
    import comfy.ops

    pair = load(run_node, files(name), **degrees)
    size = {k: v for k, v in CHECKPOINTS[name].size.items() if k != "out_channels"}
    module = comfy.cldm.cldm.ControlNet(**size, hint_channels=3, operations=comfy.ops.disable_weight_init)
    net = comfy.controlnet.ControlNet(randomised(module, 5), load_device=torch.device("cpu"))
    hint = torch.rand(1, 80, 112, 3, generator=torch.Generator().manual_seed(9))
    plain = prompts(run_node, pair.stock.clip)
    controlled = run_node(
        "ControlNetApplyAdvanced", positive=plain[0], negative=plain[1], control_net=net, image=hint,
        strength=0.8, start_percent=0.0, end_percent=0.9,
    )  # fmt: skip

    ours, stock = (sampled(run_node, one.model, list(controlled)) for one in (pair.ours, pair.stock))

    assert relative_l2(ours, stock) <= PER_RUN
    assert degrees or torch.equal(ours, stock)
    assert relative_l2(stock, sampled(run_node, pair.stock.model, plain)) > 0.01


def test_xdit_sampler_draws_what_ksampler_draws(run_node, files):
    """Its loop is the host's, as no loop in the ranks has a U-Net."""
    pair = load(run_node, files("sd15"))
    conditioning = prompts(run_node, pair.ours.clip)

    ours = sampled(run_node, pair.ours.model, conditioning, node="XDiTSampler")

    assert torch.equal(ours, sampled(run_node, pair.stock.model, conditioning))


def test_a_lora_of_both_is_stocks(comfyui, run_node, files):
    """LoraLoader: the diffusion model's part goes to the ranks, the text encoder's is applied here."""
    pair = load(run_node, files("sd15"))
    generator = torch.Generator().manual_seed(5)

    def of(name: str, rows: int, columns: int, *kernel: int) -> dict[str, torch.Tensor]:
        return {
            f"{name}.lora_up.weight": torch.randn(rows, 4, *(1 for _ in kernel), generator=generator),
            f"{name}.lora_down.weight": torch.randn(4, columns, *kernel, generator=generator),
        }

    save(
        of("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q", 32, 32)
        | of("lora_unet_down_blocks_0_resnets_0_conv1", 32, 32, 3, 3)
        | of("lora_te_text_model_encoder_layers_0_self_attn_q_proj", 64, 64),
        comfyui.models / "loras" / "sd15_lora.safetensors",
    )
    before = sampled(run_node, pair.ours.model, prompts(run_node, pair.ours.clip))

    drawn = []
    for one in (pair.ours, pair.stock):
        model, clip = run_node(
            "LoraLoader", model=one.model, clip=one.clip, lora_name="sd15_lora.safetensors",
            strength_model=0.5, strength_clip=0.5,
        )  # fmt: skip
        drawn.append(sampled(run_node, model, prompts(run_node, clip)))

    assert relative_l2(*drawn) <= PER_RUN
    assert relative_l2(drawn[0], before) > 0.01
    assert torch.equal(sampled(run_node, pair.ours.model, prompts(run_node, pair.ours.clip)), before)


# ---------------------------------------------------------------------- quantised


def scaled(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As in ComfyUI's repackaged SD3.5 and FLUX.1 checkpoints: a marker, and a scale per layer."""
    fp8 = torch.float8_e4m3fn
    given = {f"{MODEL}scaled_fp8": torch.zeros(2, dtype=fp8), **tensors}
    for key, tensor in tensors.items():
        if key.startswith(f"{MODEL}joint_blocks") and key.endswith(".weight") and tensor.ndim == 2:
            scale = tensor.abs().max() / 448
            given[key] = (tensor / scale).to(fp8)
            given[f"{key.removesuffix('weight')}scale_weight"] = scale.float()
    return given


def plain(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every weight of the diffusion model in fp8, without scales."""
    fp8 = torch.float8_e4m3fn
    return {k: t.to(fp8) if k.startswith(MODEL) and t.ndim > 1 else t for k, t in tensors.items()}


@pytest.mark.parametrize("degrees", [{}, {"cfg_parallel_degree": 2}, {"ulysses_degree": 2}], ids=str)
@pytest.mark.parametrize("quantised", [scaled, plain])
def test_a_quantised_checkpoint(run_node, checkpoints, files, quantised, degrees):
    name = f"sd3_{quantised.__name__}.safetensors"
    save(quantised(load_file(checkpoints / files("sd3"))), checkpoints / name)
    pair = load(run_node, name, **degrees)
    conditionings = [prompts(run_node, one.clip) for one in (pair.ours, pair.stock)]
    assert all(map(equal, *conditionings))

    ours, stock = (
        sampled(run_node, one.model, conditioning, 16)
        for one, conditioning in zip((pair.ours, pair.stock), conditionings, strict=True)
    )

    assert relative_l2(ours, stock) <= PER_RUN
    assert degrees or torch.equal(ours, stock)


# ---------------------------------------------------------------------- the shipped workflow


def outputs_of(run_node, graph: dict[str, Any], node: str) -> tuple[Any, ...]:
    """What a node of an API graph gives, after those it depends on."""
    inputs = {
        name: outputs_of(run_node, graph, value[0])[value[1]] if isinstance(value, list) else value
        for name, value in graph[node]["inputs"].items()
    }
    return run_node(graph[node]["class_type"], **inputs)


def test_the_workflow_of_sd35_draws_what_it_draws_with_the_stock_loader(
    comfyui, run_node, checkpoints, files
):
    workflow = json.loads((ROOT / "workflows" / "sd3.5_checkpoint.json").read_text())
    graph = api_of(workflow, comfyui.mappings)
    (loader,) = (node for node, of in graph.items() if of["class_type"] == "XDiTLoadCheckpoint")
    (size,) = (node for node, of in graph.items() if of["class_type"] == "EmptySD3LatentImage")
    (decode,) = (node for node, of in graph.items() if of["class_type"] == "VAEDecode")
    save(scaled(load_file(checkpoints / files("sd3"))), checkpoints / graph[loader]["inputs"]["ckpt_name"])
    graph[size]["inputs"] |= {"width": 80, "height": 112}

    (ours,) = outputs_of(run_node, graph, decode)
    name = graph[loader]["inputs"]["ckpt_name"]
    graph[loader] = {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": name}}
    (stock,) = outputs_of(run_node, graph, decode)

    assert ours.shape == (1, 112, 80, 3) and stock.std() > 0.01
    assert relative_l2(ours, stock) <= PER_RUN


# ---------------------------------------------------------------------- what a file lacks


def test_without_a_clip_there_is_none_as_in_stock(run_node, checkpoints):
    pair = load(run_node, write("sd15", checkpoints, "clip"))

    assert pair.ours.clip is None and pair.stock.clip is None
    ours, stock = (sampled(run_node, one.model, prompts(run_node, None)) for one in (pair.ours, pair.stock))
    assert torch.equal(ours, stock)


def test_without_a_vae_its_use_says_so_as_in_stock(run_node, checkpoints):
    pair = load(run_node, write("sd15", checkpoints, "vae"))

    said = []
    for one in (pair.ours, pair.stock):
        with pytest.raises(RuntimeError) as refused:
            run_node("VAEDecode", samples={"samples": torch.zeros(1, 4, 8, 8)}, vae=one.vae)
        said.append(str(refused.value))
    assert said[0] == said[1] and "VAE" in said[0]


@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_a_diffusion_model_alone_among_the_checkpoints(run_node, checkpoints, name):
    """As stock: a MODEL, no CLIP, and a VAE that raises when it is used."""
    tensors = {key.removeprefix(MODEL): tensor for key, tensor in parts(name)["model"].items()}
    save(tensors, checkpoints / f"{name}_alone.safetensors")
    pair = load(run_node, f"{name}_alone.safetensors")

    assert pair.ours.clip is None and pair.stock.clip is None
    assert pair.ours.model.model.model_type == pair.stock.model.model.model_type
    with pytest.raises(RuntimeError, match="VAE"):
        run_node("VAEDecode", samples={"samples": torch.zeros(1, 4, 8, 8)}, vae=pair.ours.vae)


# ---------------------------------------------------------------------- what is read, and where


def mapped(pid: int | str, file: Path) -> int | None:
    """Bytes of a file that a process has in its memory by mapping it; None where it does not map it."""
    lines = Path(f"/proc/{pid}/smaps").read_text().splitlines()
    starts = [i for i, line in enumerate(lines) if line.endswith(str(file))]
    resident = [next(line for line in lines[i + 1 :] if line.startswith("Rss:")) for i in starts]
    return sum(int(line.split()[1]) * 1024 for line in resident) if starts else None


def test_the_host_keeps_nothing_of_the_model_and_a_rank_reads_nothing_else(run_node, checkpoints):
    file = checkpoints / write("sd15", checkpoints, file="sd15_large")
    tensors = load_file(file)
    more = {f"cond_stage_model.unused.{i}.weight": torch.ones(512, 4096) for i in range(4)}  # 32 MiB
    save(tensors | more, file)
    model_bytes = sum(t.nbytes for key, t in tensors.items() if key.startswith(MODEL))

    kept = run_node("XDiTLoadCheckpoint", ckpt_name=file.name, parallel=layout(1))

    assert all(parameter.is_meta for parameter in kept[0].model.diffusion_model.parameters())
    assert mapped("self", file) is None
    pids = [pid for group in running_groups() for pid in group.pids]
    read = [found for pid in pids if (found := mapped(pid, file)) is not None]
    assert read and max(read) <= model_bytes + (2 << 20)
