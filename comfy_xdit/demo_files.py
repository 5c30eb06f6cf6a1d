"""What comes with the pack to be tried: names that widgets show, and where it is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from comfy_xdit.environment import ROOT

NOTHING: Mapping[str, Path] = MappingProxyType({})
DEMO = ROOT / "assets" / "demo"
DEMO_PIPELINES = {"demo (comfy_xdit)": DEMO / "pipeline"}
DEMO_DIFFUSION_MODELS = {"demo_sd3 (comfy_xdit).safetensors": DEMO / "demo_sd3.safetensors"}
DEMO_VAES = {"demo_vae (comfy_xdit).safetensors": DEMO / "pipeline" / "vae"}
DEMO_LORAS = {"demo_framed (comfy_xdit).safetensors": DEMO / "demo_framed_lora.safetensors"}
DEMO_CONTROL_NETS = {
    "demo_edges (comfy_xdit).safetensors": DEMO / "controlnet" / "diffusion_pytorch_model.safetensors"
}


def present(demo: Mapping[str, Path]) -> list[str]:
    """The names of those that are there: a slim copy of the pack may lack them."""
    return [name for name, path in demo.items() if path.exists()]
