"""XDiTParallelConfig: how the ranks share the work."""

from __future__ import annotations

from typing import Any

from comfy_xdit.protocol.parallel import DEGREES, Automatic, ParallelConfig, available_devices, parse_devices

MAX_DEGREE = 64
_TOOLTIPS = {
    "data_parallel_degree": "Splits the batch of pictures.",
    "cfg_parallel_degree": "2 computes the positive and the negative prompt at the same time. Needs cfg > 1.",
    "ulysses_degree": "Splits the picture's tokens; attention heads are exchanged between the ranks.",
    "ring_degree": "Splits the picture's tokens; keys and values travel in a ring.",
    "pipefusion_degree": "Splits the layers; patches of the picture travel through them. XDiTSampler only.",
}


def _degree(tooltip: str) -> tuple[str, dict[str, Any]]:
    return "INT", {"default": 1, "min": 1, "max": MAX_DEGREE, "tooltip": tooltip}


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
                **{name: _degree(_TOOLTIPS[name]) for name in DEGREES},
                "warmup_steps": ("INT", warmup),
                "shard_weights": ("BOOLEAN", shard),
                "devices": ("STRING", devices),
            }
        }

    def configure(self, **widgets: Any) -> tuple[ParallelConfig | Automatic]:
        """The layout, checked: degrees that do not fit are an error of this node."""
        return (parallel_config(**widgets),)


def parallel_config(strategy: str, devices: str, **widgets: Any) -> ParallelConfig | Automatic:
    """What the widgets describe, checked against this machine; the loader chooses for `auto`.

    Raises:
        InvalidInput: a device that is not there, or degrees that do not fit the devices.
    """
    available = available_devices()
    chosen = parse_devices(devices, available)
    if strategy == "auto":
        return Automatic(chosen, bool(widgets.get("shard_weights")))
    return ParallelConfig(devices=chosen, **widgets).check(available)
