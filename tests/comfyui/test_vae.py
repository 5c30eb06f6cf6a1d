"""XDiTLoadVAE before stock nodes, against the stock VAE of the same file. Tolerance: relative L2 1e-5."""

from __future__ import annotations

import importlib
import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import vaes
from tests.comfyui.inputs import layout, relative_l2

TOLERANCE = 1e-5
LEVELS = 4  # ComfyUI takes 8 for the compression of every VAE of pictures
KL = vaes.CONFIGS["AutoencoderKL"] | {
    "block_out_channels": (32, 32, 64, 64),
    "down_block_types": ("DownEncoderBlock2D",) * LEVELS,
    "up_block_types": ("UpDecoderBlock2D",) * LEVELS,
    "layers_per_block": 2,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
}
# What ComfyUI's own classes are made with for the same widths.
DDCONFIG = {
    "double_z": True, "z_channels": 16, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 32,
    "ch_mult": [1, 1, 2, 2], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0,
}  # fmt: skip


def write(comfyui: SimpleNamespace, name: str, tensors: dict[str, torch.Tensor]) -> str:
    with torch.inference_mode(False):
        save_file({k: v.contiguous() for k, v in tensors.items()}, comfyui.models / "vae" / name)
    return name


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    """One of ComfyUI's modules with weights where every layer matters."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, tensor in module.state_dict().items():
        fan = max(1, tensor[0].numel()) if tensor.ndim > 1 else 1
        scale = fan**-0.5 if tensor.ndim > 1 else 0.1
        noise = torch.randn(tensor.shape, generator=generator) * scale
        ones = name.endswith(("gamma", "running_var")) or (tensor.ndim == 1 and name.endswith("weight"))
        state[name] = (noise.abs() if name.endswith("running_var") else noise) + float(ones)
    module.load_state_dict(state)
    return module.eval()


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def pair(comfyui: SimpleNamespace) -> SimpleNamespace:
    return kl(comfyui)


def kl(comfyui: SimpleNamespace) -> SimpleNamespace:
    """A tiny VAE of pictures: the stock one, and the name of its file."""
    import comfy.sd

    module = vaes.build("AutoencoderKL", KL)
    name = write(comfyui, "tiny_kl.safetensors", vaes.ldm_names(module))
    tensors = load_file(comfyui.models / "vae" / name)
    stock = comfy.sd.VAE(sd=tensors, config={"params": {"ddconfig": DDCONFIG, "embed_dim": 16}})
    stock.latent_channels = 16
    return SimpleNamespace(name=name, stock=stock)


@pytest.fixture
def both(pair: SimpleNamespace, run_node: Any) -> Any:
    """both(node, **inputs) -> what the node gives with our VAE on two ranks and with the stock one."""
    (ours,) = run_node("XDiTLoadVAE", vae_name=pair.name, parallel=layout(2))

    def run(node: str, **inputs: Any) -> tuple[Any, Any]:
        return tuple(run_node(node, vae=vae, **inputs)[0] for vae in (ours, pair.stock))

    return run


@pytest.mark.parametrize("rows", [17, 18])
def test_decode(both: Any, rows: int):
    ours, stock = both("VAEDecode", samples={"samples": random(2, 16, rows, 9)})
    assert ours.shape == stock.shape == (2, rows * 8, 72, 3)
    assert relative_l2(ours, stock) <= TOLERANCE


def test_encode(both: Any):
    ours, stock = both("VAEEncode", pixels=random(2, 61, 76, 3).abs().clamp(0, 1))
    assert ours["samples"].shape == stock["samples"].shape == (2, 16, 7, 9)
    assert relative_l2(ours["samples"], stock["samples"]) <= TOLERANCE


def test_decode_tiled(both: Any):
    latent = {"samples": random(1, 16, 20, 24)}
    options = {"tile_size": 64, "overlap": 32, "temporal_size": 64, "temporal_overlap": 8}
    ours, stock = both("VAEDecodeTiled", samples=latent, **options)
    whole, _ = both("VAEDecode", samples=latent)

    assert relative_l2(ours, stock) <= TOLERANCE
    assert relative_l2(ours, whole) > 100 * TOLERANCE


def test_encode_tiled(both: Any):
    options = {"tile_size": 64, "overlap": 16, "temporal_size": 64, "temporal_overlap": 8}
    ours, stock = both("VAEEncodeTiled", pixels=random(1, 200, 161, 3).abs().clamp(0, 1), **options)
    assert relative_l2(ours["samples"], stock["samples"]) <= TOLERANCE


def test_encode_for_inpaint(both: Any):
    mask = torch.zeros(1, 64, 72)
    mask[:, 20:40, 20:40] = 1.0
    pixels = random(1, 64, 72, 3).abs().clamp(0, 1)
    ours, stock = both("VAEEncodeForInpaint", pixels=pixels, mask=mask, grow_mask_by=6)

    assert relative_l2(ours["samples"], stock["samples"]) <= TOLERANCE
    assert torch.equal(ours["noise_mask"], stock["noise_mask"])


def test_our_node_in_tiles_and_whole(pair: SimpleNamespace, run_node: Any):
    (vae,) = run_node("XDiTLoadVAE", vae_name=pair.name, parallel=layout(2))
    latent = {"samples": random(1, 16, 40, 41)}
    (whole,) = run_node("XDiTVAEDecode", samples=latent, vae=vae, tiling="none")
    (tiled,) = run_node("XDiTVAEDecode", samples=latent, vae=vae, tiling="256 px")

    assert torch.equal(whole, run_node("VAEDecode", samples=latent, vae=vae)[0])
    assert 1e-3 < relative_l2(tiled, whole) < 0.3
    shown = run_node("XDiTVAEDecode", samples={"samples": random(1, 16, 1, 8)}, vae=vae, tiling="none")
    assert shown["ui"]["text"][0].startswith("1 of 2 ranks did the work: the latent has 1 rows")
    assert shown["result"][0].shape == (1, 8, 64, 3)


def test_interrupt_leaves_the_ranks_warm(pair: SimpleNamespace, run_node: Any):
    import comfy.model_management as management

    from comfy_xdit.comfy_types.model.handles import remote_of
    from comfy_xdit.ranks.registry import worker_group

    (vae,) = run_node("XDiTLoadVAE", vae_name=pair.name, parallel=layout(2))
    latent = {"samples": random(1, 16, 24, 24)}
    (expected,) = run_node("VAEDecode", samples=latent, vae=vae)
    pids = list(worker_group(remote_of(vae).parallel).pids)

    management.interrupt_current_processing(True)
    with pytest.raises(management.InterruptProcessingException):
        run_node("VAEDecode", samples=latent, vae=vae)

    assert worker_group(remote_of(vae).parallel).pids == pids
    assert torch.equal(run_node("VAEDecode", samples=latent, vae=vae)[0], expected)


def test_real_size_through_the_stock_loader(comfyui: SimpleNamespace, run_node: Any):
    """SD3's and FLUX.1's VAE, as a file in bf16, with random weights."""
    config = KL | {
        "block_out_channels": (128, 256, 512, 512),
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
    tensors = {
        k: v.to(torch.bfloat16) for k, v in vaes.ldm_names(vaes.build("AutoencoderKL", config)).items()
    }
    name = write(comfyui, "real_kl.safetensors", tensors)
    (stock,) = run_node("VAELoader", vae_name=name)
    (ours,) = run_node("XDiTLoadVAE", vae_name=name, parallel=layout(2))
    latent = {"samples": random(1, 16, 9, 8)}
    (expected,) = run_node("VAEDecode", samples=latent, vae=stock)

    assert relative_l2(run_node("VAEDecode", samples=latent, vae=ours)[0], expected) <= TOLERANCE
    encoded = [run_node("VAEEncode", pixels=expected, vae=vae)[0]["samples"] for vae in (ours, stock)]
    assert relative_l2(*encoded) <= TOLERANCE
    (comfyui.models / "vae" / name).unlink()


def test_video_through_the_stock_loader(comfyui: SimpleNamespace, run_node: Any):
    """Wan 2.1; Qwen-Image's VAE is the same network. Newer ComfyUI takes its width from the file."""
    import comfy.sd

    is_narrow = "decoder.head.0.gamma" in inspect.getsource(comfy.sd.VAE.__init__)
    module = vaes.build("AutoencoderKLWan", vaes.WAN_2_1 | {"base_dim": 8 if is_narrow else 96})
    name = write(comfyui, "wan.safetensors", vaes.wan_names(module))
    (stock,) = run_node("VAELoader", vae_name=name)
    (ours,) = run_node("XDiTLoadVAE", vae_name=name, parallel=layout(2))
    latent = {"samples": random(1, 16, 2, 9, 6)}
    (expected,) = run_node("VAEDecode", samples=latent, vae=stock)
    assert expected.shape == (5, 72, 48, 3)

    assert relative_l2(run_node("VAEDecode", samples=latent, vae=ours)[0], expected) <= TOLERANCE
    encoded = [run_node("VAEEncode", pixels=expected, vae=vae)[0]["samples"] for vae in (ours, stock)]
    assert encoded[0].shape == encoded[1].shape == (1, 16, 2, 9, 6)
    assert relative_l2(*encoded) <= TOLERANCE
    options = {"tile_size": 64, "overlap": 16, "temporal_size": 8, "temporal_overlap": 4}
    tiled = [run_node("VAEDecodeTiled", samples=latent, vae=vae, **options)[0] for vae in (ours, stock)]
    assert relative_l2(*tiled) <= TOLERANCE
    tiled = [run_node("VAEEncodeTiled", pixels=expected, vae=vae, **options)[0] for vae in (ours, stock)]
    assert relative_l2(tiled[0]["samples"], tiled[1]["samples"]) <= TOLERANCE
    (comfyui.models / "vae" / name).unlink()


def _original(name: str) -> tuple[torch.nn.Module, tuple[int, ...]]:
    """A tiny network of ComfyUI's own, and the shape of a latent for it."""
    if name == "Wan 2.2":
        wan = importlib.import_module("comfy.ldm.wan.vae2_2")
        module = wan.WanVAE(
            dim=16, z_dim=48, dim_mult=[1, 2, 4, 4], num_res_blocks=2, attn_scales=[],
            temperal_downsample=[False, True, True], dropout=0.0,
        )  # fmt: skip
        return module, (1, 48, 3, 7, 4)
    autoencoder = importlib.import_module("comfy.ldm.models.autoencoder").AutoencoderKL
    if name == "HunyuanVideo":
        config = DDCONFIG | {"conv3d": True, "time_compress": 4, "ch_mult": [1, 1, 1, 1]}
        # Of several frames ComfyUI makes chunks with norms of their own, and lets attention look ahead.
        return autoencoder(ddconfig=config, embed_dim=16), (1, 16, 1, 7, 4)
    config = DDCONFIG | {"batch_norm_latent": True, "z_channels": 32}
    return autoencoder(ddconfig=config, embed_dim=32), (1, 128, 7, 4)


@pytest.mark.parametrize("name", ["Wan 2.2", "HunyuanVideo", "FLUX.2"])
def test_original_networks(comfyui: SimpleNamespace, run_node: Any, name: str):
    """Files whose width ComfyUI's loader fixes: its network itself is the reference."""
    with torch.inference_mode(False):
        module, shape = _original(name)
        if name == "FLUX.2" and not hasattr(module, "bn"):
            pytest.skip("this ComfyUI does not know FLUX.2")
        randomised(module)
    file = write(comfyui, f"{name}.safetensors", module.state_dict())
    (vae,) = run_node("XDiTLoadVAE", vae_name=file, parallel=layout(2))
    latent = random(*shape)
    with torch.inference_mode():
        expected = ((module.decode(latent) + 1) / 2).clamp(0, 1).movedim(1, -1)
        encoded = module.encode(expected.movedim(-1, 1) * 2 - 1)

    assert relative_l2(vae.decode(latent), expected) <= TOLERANCE
    assert relative_l2(vae.encode(expected), encoded) <= TOLERANCE
