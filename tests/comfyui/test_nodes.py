"""The pack as ComfyUI loads it: names, help pages, choices and refusals of the nodes."""

import pytest

from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.parallel import Automatic, ParallelConfig
from comfy_xdit.ranks.environment import ROOT
from comfy_xdit.ranks.registry import worker_group
from tests.comfyui.inputs import DEMO, empty_latent, layout, random_conditioning
from tests.test_surroundings import lacking

NODES = {
    "XDiTParallelConfig": ("XDIT_PARALLEL",),
    "XDiTLoadCheckpoint": ("MODEL", "CLIP", "VAE"),
    "XDiTLoadPipeline": ("MODEL", "CLIP", "VAE"),
    "XDiTLoadDiffusionModel": ("MODEL",),
    "XDiTLoraLoader": ("MODEL",),
    "XDiTControlNetLoader": ("CONTROL_NET",),
    "XDiTControlNetApply": ("CONDITIONING",),
    "XDiTIPAdapterLoader": ("XDIT_IP_ADAPTER",),
    "XDiTIPAdapterApply": ("MODEL",),
    "XDiTSampler": ("LATENT",),
    "XDiTVAEDecode": ("IMAGE",),
    "XDiTStatus": ("STRING",),
}


@pytest.mark.parametrize("name", NODES)
def test_node_is_there_with_its_outputs_and_help_page(comfyui, name):
    node = comfyui.mappings[name]

    assert NODES[name] == node.RETURN_TYPES
    assert comfyui.nodes.NODE_DISPLAY_NAME_MAPPINGS[name].startswith("xDiT ")
    assert node.CATEGORY == "xDiT"
    assert node.DESCRIPTION
    assert (ROOT / "web" / "docs" / f"{name}.md").read_text().startswith(f"# {node.TITLE}")


@pytest.mark.parametrize("name", NODES)
def test_every_input_has_a_tooltip_and_every_float_a_step(comfyui, name):
    for group in comfyui.mappings[name].INPUT_TYPES().values():
        for input_name, (kind, *options) in group.items():
            assert options[0]["tooltip"], input_name
            if kind == "FLOAT":
                assert {"step", "round"} <= options[0].keys(), input_name


def test_demo_is_among_the_choices_of_the_loaders(comfyui):
    if not (DEMO / "demo_sd3.safetensors").is_file():
        pytest.skip("no demo model")
    pipelines = comfyui.mappings["XDiTLoadPipeline"].INPUT_TYPES()["required"]["pipeline"][0]
    files = comfyui.mappings["XDiTLoadDiffusionModel"].INPUT_TYPES()["required"]["unet_name"][0]
    loras = comfyui.mappings["XDiTLoraLoader"].INPUT_TYPES()["required"]["lora_name"][0]

    assert "demo (comfy_xdit)" in pipelines
    assert "demo_sd3 (comfy_xdit).safetensors" in files
    assert "demo_framed (comfy_xdit).safetensors" in loras


def test_parallel_config_is_checked_by_its_node(run_node):
    widgets = dict.fromkeys(
        ("data_parallel_degree", "cfg_parallel_degree", "ring_degree", "pipefusion_degree", "warmup_steps"), 1
    )
    widgets |= {"ulysses_degree": 2, "shard_weights": False, "devices": "cpu, cpu"}

    (config,) = run_node("XDiTParallelConfig", strategy="manual", **widgets)
    assert config == ParallelConfig(ulysses_degree=2, devices=("cpu", "cpu"))
    (automatic,) = run_node("XDiTParallelConfig", strategy="auto", **{**widgets, "ulysses_degree": 7})
    assert automatic == Automatic(("cpu", "cpu"))
    with pytest.raises(InvalidInput, match="ulysses_degree 3 = 3, but 2 devices"):
        run_node("XDiTParallelConfig", strategy="manual", **{**widgets, "ulysses_degree": 3})


def test_bad_file_is_an_error_of_the_loader_and_the_ranks_go_on(comfyui, run_node, tiny_sd3):
    (comfyui.models / "diffusion_models" / "bad.safetensors").write_bytes(b"not a model")

    with pytest.raises(InvalidInput, match=r"bad\.safetensors"):
        run_node(
            "XDiTLoadDiffusionModel",
            unet_name="bad.safetensors",
            weight_dtype="default",
            parallel=layout(1),
        )
    run_node("XDiTLoadDiffusionModel", unet_name=tiny_sd3, weight_dtype="default", parallel=layout(1))


def test_a_stock_sampler_cannot_run_pipefusion_and_the_ranks_go_on(run_node, tiny_sd3):
    parallel = layout(pipefusion_degree=2)
    (ours,) = run_node(
        "XDiTLoadDiffusionModel", unet_name=tiny_sd3, weight_dtype="default", parallel=parallel
    )
    settings = {"seed": 1, "steps": 2, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple"}
    settings |= {"denoise": 1.0, "latent_image": empty_latent(), "model": ours}
    settings |= {"positive": random_conditioning(ours, 1), "negative": random_conditioning(ours, 2)}

    with pytest.raises(InvalidInput, match=r"pipefusion_degree 2.*use xDiT Sampler \(XDiTSampler\)"):
        run_node("KSampler", **settings)
    pids = worker_group(parallel).pids
    run_node("XDiTSampler", **settings)
    assert worker_group(parallel).pids == pids


def test_missing_file_is_named(run_node):
    with pytest.raises(InvalidInput, match=r"no diffusion model 'none\.safetensors'"):
        run_node("XDiTLoadDiffusionModel", unet_name="none.safetensors", weight_dtype="default")


def test_comfyui_offers_what_the_nodes_need(comfyui):
    from comfy_xdit.comfy_types.surroundings import COMFYUI

    assert lacking(COMFYUI) == []


def test_stock_model_is_refused_by_name(run_node, tiny_sd3):
    (stock,) = run_node("UNETLoader", unet_name=tiny_sd3, weight_dtype="default")

    with pytest.raises(InvalidInput, match="this one is a stock MODEL"):
        run_node(
            "XDiTSampler",
            model=stock,
            seed=0,
            steps=1,
            cfg=1.0,
            sampler_name="euler",
            scheduler="simple",
            positive=[],
            negative=[],
            latent_image={},
            denoise=1.0,
        )
