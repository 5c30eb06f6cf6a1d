"""What comes with the pack to be tried: names that widgets show, and where it is."""

from __future__ import annotations

from pathlib import Path

from comfy_xdit import ROOT

DEMO = ROOT / "assets" / "demo"
# By the folder of ComfyUI's models/ that one's own would lie in.
FILES = {
    "diffusers": {"demo (comfy_xdit)": DEMO / "pipeline"},
    "diffusion_models": {"demo_sd3 (comfy_xdit).safetensors": DEMO / "demo_sd3.safetensors"},
    "vae": {"demo_vae (comfy_xdit).safetensors": DEMO / "pipeline" / "vae"},
    "loras": {"demo_framed (comfy_xdit).safetensors": DEMO / "demo_framed_lora.safetensors"},
    "controlnet": {
        "demo_edges (comfy_xdit).safetensors": DEMO / "controlnet" / "diffusion_pytorch_model.safetensors"
    },
}


def names(kind: str) -> list[str]:
    """The names of those that are there: a slim copy of the pack may lack them."""
    return [name for name, path in FILES.get(kind, {}).items() if path.exists()]


def path_of(kind: str, name: str) -> Path | None:
    """Where the one of this name is; None if `name` is none of them."""
    return FILES.get(kind, {}).get(name)
