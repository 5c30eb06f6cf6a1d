"""What is around the nodes inside ComfyUI."""

from __future__ import annotations

from comfy_xdit.comfy_types import (
    beginning,
    checkpoint,
    choice,
    clip,
    driving,
    files,
    interruption,
    sampling,
    vae,
)
from comfy_xdit.comfy_types.model import controlnet, handles


class ComfyUI:
    """Implements comfy_xdit.nodes.surroundings.Surroundings."""

    begin = staticmethod(beginning.begin)
    self_check = staticmethod(beginning.self_check)

    names = staticmethod(files.names)
    path = staticmethod(files.path)

    spec_of = staticmethod(choice.spec_of)
    model_of = staticmethod(handles.model_of)
    clip_of = staticmethod(clip.clip_of)
    vae_of = staticmethod(vae.vae_of)
    clip_and_vae = staticmethod(checkpoint.clip_and_vae)
    controlnet_of = staticmethod(controlnet.RemoteControl)
    remote_of = staticmethod(handles.remote_of)
    remote_controlnet_of = staticmethod(controlnet.remote_controlnet_of)
    with_lora = staticmethod(handles.with_lora)
    with_picture = staticmethod(handles.with_picture)
    with_controlnet = staticmethod(controlnet.with_controlnet)
    decode_latent = staticmethod(vae.decode_latent)

    samplers = staticmethod(sampling.samplers)
    schedulers = staticmethod(sampling.schedulers)
    sample_request = staticmethod(sampling.sample_request)
    drive = staticmethod(driving.drive)
    progress = staticmethod(sampling.progress)
    interrupted = staticmethod(interruption.interrupted)
    interruptible = staticmethod(interruption.interruptible)


COMFYUI = ComfyUI()
