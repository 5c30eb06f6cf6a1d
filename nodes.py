"""The nodes: widgets to a spec or a request, to the ranks, to the types the graph carries.

Classes are thin and hold no state: what they return is a light handle, and the ranks compare it
with what they have. This file imports with nothing but the standard library installed; what
the nodes do is in comfy_xdit.nodes.work.
"""

from __future__ import annotations

import logging
from typing import Any

from comfy_xdit.nodes.controlnet import XDiTControlNetApply, XDiTControlNetLoader
from comfy_xdit.nodes.ip_adapter import XDiTIPAdapterApply, XDiTIPAdapterLoader
from comfy_xdit.nodes.packages import install, missing_packages, unavailable
from comfy_xdit.nodes.work import (
    TILES,
    decode,
    load_diffusion_model,
    load_pipeline,
    load_vae,
    parallel_config,
    sample,
    status,
    surroundings,
)
from comfy_xdit.protocol.parallel import DEGREES, Automatic, ParallelConfig
from comfy_xdit.protocol.spec import WEIGHT_DTYPES
from comfy_xdit.remote.lora import add_lora, lora_stamp

MAX_DEGREE = 64
MAX_SEED = 0xFFFFFFFFFFFFFFFF


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


class XDiTLoadVAE:
    """VAE from one file."""

    TITLE = "xDiT Load VAE"
    DESCRIPTION = "Loads a VAE into the ranks, which decode and encode together. Drop-in for Load VAE."
    RETURN_TYPES = ("VAE",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Widgets in their order."""
        file = {"tooltip": "Files in models/vae, and the demo of the pack."}
        return {"required": {"vae_name": (surroundings().vaes(), file)}, "optional": {"parallel": _PARALLEL}}

    def load(self, vae_name: str, parallel: ParallelConfig | Automatic | None = None) -> tuple[Any]:
        """Start the ranks if need be, and have them load."""
        return (load_vae(vae_name, parallel),)


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


class XDiTLoraLoader:
    """A MODEL with a LoRA that the ranks read from its file."""

    TITLE = "xDiT Lora Loader"
    DESCRIPTION = (
        "Adds a LoRA to an xDiT MODEL; the ranks read the file. Drop-in for LoraLoaderModelOnly, which "
        "works with an xDiT MODEL as well."
    )
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Widgets in LoraLoaderModelOnly's order."""
        strength = {"default": 1.0, "min": -100.0, "max": 100.0, "step": 0.01, "round": 0.001}
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "From an xDiT loader, or another LoRA node after it."}),
                "lora_name": (surroundings().loras(), {"tooltip": "Files in models/loras."}),
                "strength_model": ("FLOAT", strength | {"tooltip": "0: without it. Negative: its opposite."}),
            }
        }

    @classmethod
    def IS_CHANGED(cls, lora_name: str, **_: Any) -> tuple[int, int]:
        """Another file under the same name is another LoRA."""
        return lora_stamp(lora_name, surroundings())

    def load(self, model: Any, lora_name: str, strength_model: float) -> dict[str, Any]:
        """Have the ranks check the file; what it changes is shown on the node."""
        patched, text = add_lora(model, lora_name, strength_model, surroundings())
        return {"ui": {"text": [text]}, "result": (patched,)}


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
                "tiling": (
                    list(TILES),
                    {"tooltip": "none: exact, in rows over the ranks. Tiles: less memory, faint seams."},
                ),
            }
        }

    def decode(self, samples: dict[str, Any], vae: Any, tiling: str) -> Any:
        """Have the ranks decode; what was special (memory ran out, say) is shown on the node."""
        image, note = decode(samples, vae, tiling)
        return {"ui": {"text": [note]}, "result": (image,)} if note else (image,)


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


NODES = (
    XDiTParallelConfig, XDiTLoadPipeline, XDiTLoadDiffusionModel, XDiTLoadVAE, XDiTLoraLoader,
    XDiTControlNetLoader, XDiTControlNetApply, XDiTIPAdapterLoader, XDiTIPAdapterApply, XDiTSampler,
    XDiTVAEDecode, XDiTStatus,
)  # fmt: skip
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
