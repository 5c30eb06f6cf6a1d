"""What the nodes do: from the values of widgets to the ranks, and to the types the graph carries.

Imports nothing but the standard library until it is called. Inside ComfyUI the graph's types come from
comfy_xdit.comfy_types, elsewhere from comfy_xdit.headless.surroundings.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from comfy_xdit.protocol.errors import Interrupted
from comfy_xdit.protocol.parallel import Automatic, ParallelConfig, available_devices, parse_devices
from comfy_xdit.protocol.spec import ControlNet, ModelSpec

if TYPE_CHECKING:
    from comfy_xdit.remote.base import Remote

TILES = {"none": 0, "1024 px": 1024, "512 px": 512, "256 px": 256}  # of XDiTVAEDecode


def surroundings() -> ModuleType:
    """comfy_types inside ComfyUI, headless elsewhere: the same functions either way."""
    inside = "comfy" in sys.modules and "folder_paths" in sys.modules
    return importlib.import_module("comfy_xdit.comfy_types" if inside else "comfy_xdit.headless.surroundings")


def parallel_config(strategy: str, devices: str, **widgets: Any) -> ParallelConfig | Automatic:
    """What XDiTParallelConfig describes, checked against this machine; the loader chooses for `auto`.

    Raises:
        InvalidInput: a device that is not there, or degrees that do not fit the devices.
    """
    available = available_devices()
    chosen = parse_devices(devices, available)
    if strategy == "auto":
        return Automatic(chosen, bool(widgets.get("shard_weights")))
    return ParallelConfig(devices=chosen, **widgets).check(available)


def loaded(remote: Remote, here: ModuleType) -> Remote:
    """The handle, once its spec is in the ranks: a bad file is an error of the loader node."""
    here.begin()
    try:
        remote.load(interrupted=here.interrupted)
    except Interrupted:
        here.raise_if_interrupted()
        raise
    return remote


def planned(parallel: ParallelConfig | Automatic | None, spec: ModelSpec, here: ModuleType) -> ParallelConfig:
    """The layout for the transformer `spec`: the one that is given, or the planner's."""
    from comfy_xdit.planning.auto import layout_of

    here.begin()
    try:
        return layout_of(parallel or Automatic(), spec, here.interrupted)
    except Interrupted:
        here.raise_if_interrupted()
        raise


def load_diffusion_model(
    unet_name: str, weight_dtype: str, parallel: ParallelConfig | Automatic | None
) -> Any:
    """A MODEL over one diffusion model file."""
    from comfy_xdit.remote.model import RemoteModel

    here = surroundings()
    spec = ModelSpec.of(here.diffusion_model_path(unet_name), "transformer", weight_dtype)
    layout = planned(parallel, spec, here)
    return here.model_of(loaded(RemoteModel(spec, layout), here))


def load_pipeline(
    name: str, weight_dtype: str, parallel: ParallelConfig | Automatic | None
) -> tuple[Any, Any, Any]:
    """MODEL, CLIP and VAE over one diffusers folder."""
    from comfy_xdit.remote.model import RemoteModel
    from comfy_xdit.remote.text import RemoteTextEncoders
    from comfy_xdit.remote.vae import RemoteVAE

    here = surroundings()
    folder = here.pipeline_path(name)
    layout = planned(parallel, ModelSpec.of(folder, "transformer", weight_dtype), here)

    def handle(kind: str, remote: type[Remote]) -> Remote:
        return loaded(remote(ModelSpec.of(folder, kind, weight_dtype), layout), here)

    return (
        here.model_of(handle("transformer", RemoteModel)),
        here.clip_of(handle("text_encoders", RemoteTextEncoders)),
        here.vae_of(handle("vae", RemoteVAE)),
    )


def sample(model: Any, latent_image: dict[str, Any], steps: int, **inputs: Any) -> dict[str, Any]:
    """KSampler's work, with the whole loop in the ranks. Returns a LATENT."""
    here = surroundings()
    remote = here.remote_of(model)
    request, finish = here.sample_request(model, steps=steps, latent=latent_image, **inputs)
    if len(request.sigmas) < 2:  # denoise 0: nothing to do, as in KSampler
        return latent_image
    try:
        answer = remote.sample(request, on_progress=here.progress(model, steps), interrupted=here.interrupted)
    except Interrupted:
        here.raise_if_interrupted()
        raise
    return {**latent_image, "samples": finish(answer)}


def load_vae(name: str, parallel: ParallelConfig | Automatic | None) -> Any:
    """A VAE over one file."""
    from comfy_xdit.planning.auto import layout_beside
    from comfy_xdit.remote.vae import RemoteVAE

    here = surroundings()
    spec = ModelSpec.of(here.vae_path(name), "vae")
    return here.vae_of(loaded(RemoteVAE(spec, layout_beside(parallel or Automatic())), here))


def decode(samples: dict[str, Any], vae: Any, tiling: str) -> tuple[Any, str]:
    """A LATENT to an IMAGE, (B, H, W, 3) in 0..1, in the ranks, and what was special about it."""
    here = surroundings()
    remote = here.remote_of(vae)  # a stock VAE is refused by name
    pixels = here.decode_latent(vae, samples["samples"], TILES[tiling])
    return pixels.reshape(-1, *pixels.shape[-3:]), remote.note


def open_control_net(name: str) -> Any:
    """A CONTROL_NET over one file or folder."""
    from comfy_xdit.remote import controlnet

    return controlnet.open_control_net(name, surroundings())


def control_net_stamp(name: str) -> tuple[int, int]:
    """Size and modification time of a ControlNet's files."""
    return ControlNet.of(surroundings().control_net_path(name)).stamp


def apply_control_net(**inputs: Any) -> list[Any]:
    """A CONDITIONING with a ControlNet."""
    return surroundings().apply_control_net(**inputs)


def status() -> str:
    """What runs in the ranks, in words."""
    from comfy_xdit.nodes.report import report

    return report(surroundings().self_check())
