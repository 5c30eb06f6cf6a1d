"""The nodes: widgets to a spec or a request, to the ranks, to the types the graph carries.

Classes are thin and hold no state: what they return is a light handle, and the ranks compare it
with what they have. This file imports with nothing but the standard library installed; inside
ComfyUI the graph's types come from comfy_xdit.comfy_types, elsewhere from comfy_xdit.headless.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from comfy_xdit.environment import ROOT
from comfy_xdit.errors import Interrupted, InvalidInput, XDiTError
from comfy_xdit.parallel import DEGREES, Automatic, ParallelConfig, available_devices, parse_devices
from comfy_xdit.spec import WEIGHT_DTYPES, ModelSpec

if TYPE_CHECKING:
    from comfy_xdit.remote import Remote

# What is imported under which name, and what pip calls it.
NEEDED = {
    "torch": "torch",
    "safetensors": "safetensors",
    "numpy": "numpy",
    "PIL": "pillow",
    "diffusers": "diffusers",
    "transformers": "transformers",
    "accelerate": "accelerate",
    "xfuser": "xfuser",
}
MAX_DEGREE = 64
MAX_SEED = 0xFFFFFFFFFFFFFFFF


def surroundings() -> ModuleType:
    """comfy_types inside ComfyUI, headless elsewhere: the same functions either way."""
    inside = "comfy" in sys.modules and "folder_paths" in sys.modules
    return importlib.import_module("comfy_xdit.comfy_types" if inside else "comfy_xdit.headless")


# ---------------------------------------------------------------------- what the nodes do


def parallel_config(strategy: str, devices: str, **widgets: Any) -> ParallelConfig | Automatic:
    """What XDiTParallelConfig describes, checked against this machine; the loader chooses for `auto`.

    Raises:
        InvalidInput: a device that is not there, degrees that do not fit the devices, or weights to be
            sharded by `auto`.
    """
    available = available_devices()
    chosen = parse_devices(devices, available)
    if strategy == "auto":
        if widgets.get("shard_weights"):
            raise InvalidInput(
                "shard_weights with strategy auto is not in this version: the planner does not know it. "
                "Set strategy to manual with the degrees you want, or shard_weights to false."
            )
        return Automatic(chosen)
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
    from comfy_xdit.auto import layout_of

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
    from comfy_xdit.remote import RemoteModel

    here = surroundings()
    spec = ModelSpec.of(here.diffusion_model_path(unet_name), "transformer", weight_dtype)
    layout = planned(parallel, spec, here)
    return here.model_of(loaded(RemoteModel(spec, layout), here))


def load_pipeline(
    name: str, weight_dtype: str, parallel: ParallelConfig | Automatic | None
) -> tuple[Any, Any, Any]:
    """MODEL, CLIP and VAE over one diffusers folder."""
    from comfy_xdit.remote import RemoteModel, RemoteTextEncoders, RemoteVAE

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


def decode(samples: dict[str, Any], vae: Any, tiling: str) -> Any:
    """A LATENT to an IMAGE, (B, H, W, 3) in 0..1, in the ranks."""
    surroundings().remote_of(vae)  # a stock VAE is refused by name
    if tiling != "none":
        raise InvalidInput(f"tiling {tiling!r} is not in this version; choose 'none'.")
    return vae.decode(samples["samples"])


def status() -> str:
    """What runs in the ranks, in words."""
    from comfy_xdit.status import report

    return report(surroundings().self_check())


# ---------------------------------------------------------------------- the node classes


def _degree(tooltip: str) -> tuple[str, dict[str, Any]]:
    return "INT", {"default": 1, "min": 1, "max": MAX_DEGREE, "tooltip": tooltip}


_DEGREE_TOOLTIPS = {
    "data_parallel_degree": "Splits the batch of pictures.",
    "cfg_parallel_degree": "2 computes the positive and the negative prompt at the same time. Needs cfg > 1.",
    "ulysses_degree": "Splits the picture's tokens; attention heads are exchanged between the ranks.",
    "ring_degree": "Splits the picture's tokens; keys and values travel in a ring.",
    "pipefusion_degree": "Splits the layers; patches of the picture travel through them. XDiTSampler only.",
}
_PARALLEL = ("XDIT_PARALLEL", {"tooltip": "From 'xDiT Parallel Config'. Without it: all GPUs."})
_WEIGHT_DTYPE = (list(WEIGHT_DTYPES), {"tooltip": "default: as in the file on a GPU, fp32 on CPU."})


class XDiTParallelConfig:
    """How the ranks share the work."""

    TITLE = "xDiT Parallel Config"
    DESCRIPTION = "How many ranks there are and how they share the work. Connect it to an xDiT loader."
    RETURN_TYPES = ("XDIT_PARALLEL",)
    FUNCTION = "configure"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Widgets in their order."""
        strategy = (
            ["auto", "manual"],
            {"tooltip": "auto: the pack chooses, and the degrees below do not count. manual: they count."},
        )
        warmup = {"default": 1, "min": 1, "max": 100, "tooltip": "Exact steps before PipeFusion starts."}
        shard = {"default": False, "tooltip": "Each rank keeps a part of the weights only."}
        devices = {
            "default": "",
            "tooltip": "'' = all. '0,1' or 'cuda:0, cuda:1' or 'cpu, cpu': one per rank.",
        }
        return {
            "required": {
                "strategy": strategy,
                **{name: _degree(_DEGREE_TOOLTIPS[name]) for name in DEGREES},
                "warmup_steps": ("INT", warmup),
                "shard_weights": ("BOOLEAN", shard),
                "devices": ("STRING", devices),
            }
        }

    def configure(self, **widgets: Any) -> tuple[ParallelConfig | Automatic]:
        """The layout, checked: degrees that do not fit are an error of this node."""
        return (parallel_config(**widgets),)


class XDiTLoadPipeline:
    """MODEL, CLIP and VAE from a diffusers folder."""

    TITLE = "xDiT Load Pipeline"
    DESCRIPTION = "Loads a diffusers pipeline into the ranks. Drop-in for Load Checkpoint."
    RETURN_TYPES = ("MODEL", "CLIP", "VAE")
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Widgets in their order."""
        folder = {"tooltip": "Folders with a model_index.json in models/diffusers, and the demo of the pack."}
        return {
            "required": {"pipeline": (surroundings().pipelines(), folder), "weight_dtype": _WEIGHT_DTYPE},
            "optional": {"parallel": _PARALLEL},
        }

    def load(
        self, pipeline: str, weight_dtype: str, parallel: ParallelConfig | Automatic | None = None
    ) -> tuple[Any, ...]:
        """Start the ranks if need be, and have them load."""
        return load_pipeline(pipeline, weight_dtype, parallel)


class XDiTLoadDiffusionModel:
    """MODEL from one file."""

    TITLE = "xDiT Load Diffusion Model"
    DESCRIPTION = "Loads a diffusion model into the ranks. Drop-in for Load Diffusion Model (UNETLoader)."
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Widgets in their order."""
        file = {"tooltip": "Files in models/diffusion_models, and the demo of the pack."}
        return {
            "required": {
                "unet_name": (surroundings().diffusion_models(), file),
                "weight_dtype": _WEIGHT_DTYPE,
            },
            "optional": {"parallel": _PARALLEL},
        }

    def load(
        self, unet_name: str, weight_dtype: str, parallel: ParallelConfig | Automatic | None = None
    ) -> tuple[Any]:
        """Start the ranks if need be, and have them load."""
        return (load_diffusion_model(unet_name, weight_dtype, parallel),)


class XDiTSampler:
    """KSampler whose loop runs in the ranks."""

    TITLE = "xDiT Sampler"
    DESCRIPTION = (
        "KSampler with the whole loop in the ranks: the same inputs and numbers, less overhead. "
        "Samplers: euler, heun, dpmpp_2m. The stock KSampler works with an xDiT MODEL as well."
    )
    RETURN_TYPES = ("LATENT",)
    FUNCTION = "sample"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Widgets in KSampler's order."""
        here = surroundings()
        seed = {"default": 0, "min": 0, "max": MAX_SEED, "control_after_generate": True}
        cfg = {"default": 4.0, "min": 0.0, "max": 100.0, "step": 0.1, "round": 0.01}
        denoise = {"default": 1.0, "min": 0.0, "max": 1.0, "step": 0.01, "round": 0.001}
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "From an xDiT loader."}),
                "seed": ("INT", seed | {"tooltip": "Makes the noise."}),
                "steps": ("INT", {"default": 20, "min": 1, "max": 10000, "tooltip": "Steps of the run."}),
                "cfg": (
                    "FLOAT",
                    cfg | {"tooltip": "How strongly the prompt counts; 1 = no negative prompt."},
                ),
                "sampler_name": (here.samplers(), {"tooltip": "euler, heun and dpmpp_2m run in the ranks."}),
                "scheduler": (here.schedulers(), {"tooltip": "How the noise falls from step to step."}),
                "positive": ("CONDITIONING", {"tooltip": "What the picture shows."}),
                "negative": ("CONDITIONING", {"tooltip": "What it does not show. Ignored at cfg 1."}),
                "latent_image": ("LATENT", {"tooltip": "Where to start."}),
                "denoise": ("FLOAT", denoise | {"tooltip": "Below 1 the start shows through."}),
            }
        }

    def sample(self, **inputs: Any) -> tuple[dict[str, Any]]:
        """Have the ranks run the loop."""
        return (sample(**inputs),)


class XDiTVAEDecode:
    """Latents to pictures in the ranks."""

    TITLE = "xDiT VAE Decode"
    DESCRIPTION = "Decodes latents in the ranks. The stock VAE Decode works with an xDiT VAE as well."
    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "decode"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Widgets in their order."""
        return {
            "required": {
                "samples": ("LATENT", {"tooltip": "The latent to decode."}),
                "vae": ("VAE", {"tooltip": "From an xDiT loader."}),
                "tiling": (["none"], {"tooltip": "none: the whole picture at once."}),
            }
        }

    def decode(self, samples: dict[str, Any], vae: Any, tiling: str) -> tuple[Any]:
        """Have the ranks decode."""
        return (decode(samples, vae, tiling),)


class _Anything(str):
    """A socket type that every link fits: ComfyUI and the headless runner ask by `!=`."""

    def __ne__(self, _other: object) -> bool:
        return False

    __hash__ = str.__hash__


class XDiTStatus:
    """What runs in the ranks."""

    TITLE = "xDiT Status"
    DESCRIPTION = (
        "Says what the ranks run on and hold, how long their last work took, and the bridge's bytes."
    )
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("report",)
    FUNCTION = "report"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Nothing that is needed."""
        after = {"tooltip": "Anything: the report is made when it is there, e.g. after a sampler."}
        return {"required": {}, "optional": {"after": (_Anything("*"), after)}}

    @classmethod
    def IS_CHANGED(cls, **_: Any) -> float:
        """Never the same twice."""
        return float("nan")

    def report(self, after: Any = None) -> dict[str, Any]:
        """Ask the ranks; the report is shown on the node's output and in the run's history."""
        text = status()
        return {"ui": {"text": [text]}, "result": (text,)}


# ---------------------------------------------------------------------- what ComfyUI sees


def missing_packages() -> list[str]:
    """What pip has to install before the nodes can work."""
    return [pip for name, pip in NEEDED.items() if importlib.util.find_spec(name) is None]


def install(missing: list[str]) -> str:
    """The command that installs it. The requirements leave out torch, which no pack may replace."""
    torch = "torch " if "torch" in missing else ""
    return f"{sys.executable} -m pip install {torch}-r {ROOT / 'requirements.txt'}"


def unavailable(node: type, missing: list[str]) -> type:
    """A node of the same name and outputs that says what is missing when it is executed."""
    text = f"comfy_xdit needs {', '.join(missing)}, not installed in this Python. Run: {install(missing)}"

    def explain(self: Any, **_: Any) -> None:
        raise XDiTError(text)

    inputs = classmethod(lambda cls: {"required": {}})
    return type(node.__name__, (node,), {"INPUT_TYPES": inputs, node.FUNCTION: explain})


NODES = (XDiTParallelConfig, XDiTLoadPipeline, XDiTLoadDiffusionModel, XDiTSampler, XDiTVAEDecode, XDiTStatus)
for _node in NODES:
    _node.CATEGORY = "xDiT"

_missing = missing_packages()
if _missing:
    logging.getLogger(__name__).warning(
        "comfy_xdit: its nodes do not work until %s are installed. Run: %s",
        ", ".join(_missing),
        install(_missing),
    )

NODE_CLASS_MAPPINGS = {n.__name__: unavailable(n, _missing) if _missing else n for n in NODES}
NODE_DISPLAY_NAME_MAPPINGS = {n.__name__: n.TITLE for n in NODES}
