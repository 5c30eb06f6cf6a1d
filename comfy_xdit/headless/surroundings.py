"""What nodes.py stands on when there is no ComfyUI: the same functions as comfy_xdit.comfy_types.

MODEL, CLIP and VAE are here the handles themselves. Only the demo, the folders named by
XDIT_MODELS_DIR, and paths typed into a widget are offered.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from comfy_xdit import demo_files
from comfy_xdit.headless import conversion
from comfy_xdit.protocol.errors import Interrupted, InvalidInput
from comfy_xdit.protocol.messages import Progress, Sample
from comfy_xdit.protocol.spec import LoraFile
from comfy_xdit.remote import patches
from comfy_xdit.remote.base import Remote
from comfy_xdit.remote.controlnet import apply_control_net, control_net_of  # noqa: F401 - of the shared names
from comfy_xdit.remote.ip_adapter import PicturePrompt, at_sigmas
from comfy_xdit.remote.model import RemoteModel
from comfy_xdit.remote.schedulers import SCHEDULERS, Sampling
from comfy_xdit.remote.text import RemoteTextEncoders
from comfy_xdit.remote.vae import RemoteVAE

SAMPLERS = conversion.SAMPLERS
# Environment: a folder with diffusers/, diffusion_models/, loras/, vae/, controlnet/, ipadapter/
MODELS_DIR = "XDIT_MODELS_DIR"
INDEX = "model_index.json"

ShowStep = Callable[[int, int], None]  # (steps done, steps)
_show_step: ContextVar[ShowStep | None] = ContextVar("show_step", default=None)
_stop_asked = False  # a plain flag: a signal handler must take no lock


# ---------------------------------------------------------------------- the graph's types


def begin() -> None:
    """Prepare for a model: there is nothing to prepare without ComfyUI."""


def self_check() -> tuple[str, ...]:
    """What has changed in ComfyUI: nothing where there is none."""
    return ()


def model_of(remote: RemoteModel) -> RemoteModel:
    """MODEL: the handle itself."""
    return remote


def clip_of(remote: RemoteTextEncoders) -> RemoteTextEncoders:
    """CLIP: the handle itself."""
    return remote


def vae_of(remote: RemoteVAE) -> RemoteVAE:
    """VAE: the handle itself; it has decode and encode."""
    return remote


def decode_latent(vae: RemoteVAE, latent: torch.Tensor, tile: int) -> torch.Tensor:
    """XDiTVAEDecode's work: (B, [T,] H, W, 3) in 0..1."""
    return vae.decode(latent, interrupted=interrupted, tile=tile)


def remote_of(thing: Any) -> Remote:
    """The handle behind a MODEL, CLIP or VAE.

    Raises:
        InvalidInput: it is none of them.
    """
    if not isinstance(thing, Remote):
        raise InvalidInput(
            f"{type(thing).__name__} is neither a MODEL, a CLIP nor a VAE; connect an xDiT loader."
        )
    return thing


def sample_request(
    model: RemoteModel,
    seed: int,
    steps: int,
    cfg: float,
    sampler_name: str,
    scheduler: str,
    positive: list[Any],
    negative: list[Any],
    latent: dict[str, Any],
    denoise: float,
) -> tuple[Sample, Callable[[torch.Tensor], torch.Tensor]]:
    """KSampler's inputs as one message to the ranks.

    Returns:
        The message, and what turns the answer into the samples of a LATENT: (B, C, H, W), unscaled.

    Raises:
        InvalidInput: something in the inputs only ComfyUI's own KSampler can do.
    """
    remote = remote_of(model)
    info = remote.info or remote.load(interrupted=interrupted)
    request, finish = conversion.build_sample(
        remote.spec,
        info,
        seed=seed,
        steps=steps,
        cfg=cfg,
        sampler_name=sampler_name,
        scheduler=scheduler,
        positive=positive,
        negative=negative,
        latent=latent,
        denoise=denoise,
    )
    conversion.hold_nets(remote, positive, negative)
    pictures = at_sigmas(remote.pictures, Sampling.of(info).sigma_at)
    return replace(request, patches=remote.patches, image_prompts=pictures), finish


def with_file(model: RemoteModel, file: LoraFile, weights: Iterable[str], strength: float) -> RemoteModel:
    """A MODEL with a LoRA file of the ranks, which changes `weights` (native names)."""
    return replace(model, patches=patches.with_file(model.patches, file, weights, strength))


def with_picture(model: RemoteModel, prompt: PicturePrompt) -> RemoteModel:
    """A MODEL that is prompted by one more picture."""
    return replace(model, pictures=(*model.pictures, prompt))


def samplers() -> list[str]:
    """Names for the sampler widget."""
    return list(SAMPLERS)


def schedulers() -> list[str]:
    """Names for the scheduler widget."""
    return list(SCHEDULERS)


# ---------------------------------------------------------------------- progress and interrupt


@contextmanager
def showing_steps(show: ShowStep) -> Iterator[None]:
    """Within this block, steps of the ranks are shown by `show`."""
    token = _show_step.set(show)
    try:
        yield
    finally:
        _show_step.reset(token)


def progress(model: RemoteModel, steps: int) -> Callable[[Progress], None]:
    """What shows the ranks' progress on the running node."""
    show = _show_step.get()
    if show is None:
        return lambda done: None
    show(0, steps)
    return lambda done: show(done.step, done.steps)


def request_interrupt() -> None:
    """Ask the run to stop at its next step; may be called from a signal handler."""
    global _stop_asked
    _stop_asked = True


def forget_interrupt() -> None:
    """A new run begins: what was asked before is over."""
    global _stop_asked
    _stop_asked = False


def interrupted() -> bool:
    """Whether the person has asked to stop; leaves the flag as it is."""
    return _stop_asked


def raise_if_interrupted() -> None:
    """Raise Interrupted and clear the flag, if the person has asked to stop."""
    if _stop_asked:
        forget_interrupt()
        raise Interrupted("interrupted")


# ---------------------------------------------------------------------- models on disk


class Names(list[str]):
    """The names a widget offers. A path that exists counts as one of them."""

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or (isinstance(name, str) and os.path.exists(name))


def diffusion_models() -> Names:
    """Names for a widget: files below XDIT_MODELS_DIR/diffusion_models, then the demo."""
    return Names(sorted(_below("diffusion_models")) + demo_files.names("diffusion_models"))


def diffusion_model_path(name: str) -> Path:
    """The file behind a name of `diffusion_models`, or the path `name`. Raises InvalidInput if none is."""
    return _path("diffusion model", "diffusion_models", name)


def loras() -> Names:
    """Names for a widget: files below XDIT_MODELS_DIR/loras, then the demo's."""
    return Names(sorted(_below("loras")) + demo_files.names("loras"))


def lora_path(name: str) -> Path:
    """The file behind a name of `loras`, or the path `name` itself. Raises InvalidInput if there is none."""
    return _path("LoRA", "loras", name)


def control_nets() -> Names:
    """Names for a widget: files below XDIT_MODELS_DIR/controlnet, the diffusers folders in it, the demo's."""
    folders = [
        config.parent.relative_to(folder).as_posix()
        for folder in _folders("controlnet")
        for config in folder.rglob("*/config.json")
    ]
    return Names(sorted(_below("controlnet")) + sorted(folders) + demo_files.names("controlnet"))


def control_net_path(name: str) -> Path:
    """What is behind a name of `control_nets`, or the path `name`. Raises InvalidInput if nothing is."""
    return _path("ControlNet", "controlnet", name, Path.exists)


def ip_adapters() -> Names:
    """Names for a widget: files below XDIT_MODELS_DIR/ipadapter."""
    return Names(sorted(_below("ipadapter")))


def ip_adapter_path(name: str) -> Path:
    """The file behind a name of `ip_adapters`, or the path `name`. Raises InvalidInput if there is none."""
    return _path("IP-Adapter", "ipadapter", name)


def pipelines() -> Names:
    """Names for a widget: folders with a model_index.json below XDIT_MODELS_DIR/diffusers, the demo."""
    found = [
        index.parent.relative_to(folder).as_posix()
        for folder in _folders("diffusers")
        for index in folder.rglob(INDEX)
    ]
    return Names(sorted(found) + demo_files.names("diffusers"))


def pipeline_path(name: str) -> Path:
    """The folder behind a name of `pipelines`, or the path `name` itself.

    Raises:
        InvalidInput: there is none.
    """
    for path in _candidates("diffusers", name):
        if (path / INDEX).is_file():
            return path
    raise InvalidInput(
        f"no pipeline {name!r}; give the path of a diffusers folder (one with a {INDEX}), or put it into "
        f"diffusers/ of the folder named by {MODELS_DIR}."
    )


def vaes() -> Names:
    """Names for a widget: files below XDIT_MODELS_DIR/vae, then the demo."""
    return Names(sorted(_below("vae")) + demo_files.names("vae"))


def vae_path(name: str) -> Path:
    """What is behind a name of `vaes`, or the path `name` itself. Raises InvalidInput if nothing is."""
    return _path("VAE", "vae", name, Path.exists)


def _candidates(kind: str, name: str) -> list[Path]:
    """Where `name` may be: the demo comes first, a path as it is comes last."""
    demo = demo_files.path_of(kind, name)
    return [*([demo] if demo else []), *(folder / name for folder in _folders(kind)), Path(name)]


def _path(what: str, kind: str, name: str, is_there: Callable[[Path], bool] = Path.is_file) -> Path:
    for path in _candidates(kind, name):
        if is_there(path):
            return path
    either = "a safetensors file" + ("" if is_there is Path.is_file else " or of a diffusers folder")
    raise InvalidInput(
        f"no {what} {name!r}; give the path of {either}, or put it into {kind}/ of the folder named by "
        f"{MODELS_DIR}."
    )


def _folders(kind: str) -> list[Path]:
    root = os.environ.get(MODELS_DIR)
    return [Path(root) / kind] if root and (Path(root) / kind).is_dir() else []


def _below(kind: str) -> list[str]:
    return [
        path.relative_to(folder).as_posix()
        for folder in _folders(kind)
        for path in folder.rglob("*.safetensors")
    ]
