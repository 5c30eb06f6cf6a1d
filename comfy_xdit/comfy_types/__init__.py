"""The MODEL, CLIP and VAE that ComfyUI sees. The only place of the host side that imports ComfyUI.

`comfy_xdit.headless.surroundings` offers the same functions for running without ComfyUI, and nodes.py uses
whichever surroundings it finds. The shared names: begin, self_check, model_of, clip_of, vae_of, remote_of,
sample_request, progress, interrupted, raise_if_interrupted, samplers, schedulers,
diffusion_models, diffusion_model_path, loras, lora_path, with_file, pipelines, pipeline_path, vaes,
vae_path, decode_latent, control_nets, control_net_path, control_net_of, apply_control_net, ip_adapters,
ip_adapter_path, with_picture.
"""

from comfy_xdit.comfy_types.beginning import begin, self_check
from comfy_xdit.comfy_types.clip import clip_of
from comfy_xdit.comfy_types.control_net import apply_control_net, control_net_of
from comfy_xdit.comfy_types.files import (
    control_net_path,
    control_nets,
    diffusion_model_path,
    diffusion_models,
    ip_adapter_path,
    ip_adapters,
    lora_path,
    loras,
    pipeline_path,
    pipelines,
    vae_path,
    vaes,
)
from comfy_xdit.comfy_types.interruption import interrupted, raise_if_interrupted
from comfy_xdit.comfy_types.model import model_of, remote_of, with_file, with_picture
from comfy_xdit.comfy_types.sampling import progress, sample_request, samplers, schedulers
from comfy_xdit.comfy_types.vae import decode_latent, vae_of

__all__ = [
    "apply_control_net",
    "begin",
    "clip_of",
    "control_net_of",
    "control_net_path",
    "control_nets",
    "decode_latent",
    "diffusion_model_path",
    "diffusion_models",
    "interrupted",
    "ip_adapter_path",
    "ip_adapters",
    "lora_path",
    "loras",
    "model_of",
    "pipeline_path",
    "pipelines",
    "progress",
    "raise_if_interrupted",
    "remote_of",
    "sample_request",
    "samplers",
    "schedulers",
    "self_check",
    "vae_of",
    "vae_path",
    "vaes",
    "with_file",
    "with_picture",
]
