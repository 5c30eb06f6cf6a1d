"""XDiTSampler: KSampler whose loop runs in the ranks."""

from __future__ import annotations

from typing import Any

from comfy_xdit.nodes.surroundings import SamplerInputs, Surroundings, surroundings
from comfy_xdit.protocol.spec import SAMPLERS

MAX_SEED = 0xFFFFFFFFFFFFFFFF
_NAMES = f"{', '.join(SAMPLERS[:-1])} and {SAMPLERS[-1]}"


class XDiTSampler:
    """KSampler whose loop runs in the ranks."""

    TITLE = "xDiT Sampler"
    DESCRIPTION = (
        "KSampler with the whole loop in the ranks: the same inputs and numbers, less overhead. "
        f"Samplers: {', '.join(SAMPLERS)}. The stock KSampler works with an xDiT MODEL as well."
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
                "sampler_name": (here.samplers(), {"tooltip": f"{_NAMES} run in the ranks."}),
                "scheduler": (here.schedulers(), {"tooltip": "How the noise falls from step to step."}),
                "positive": ("CONDITIONING", {"tooltip": "What the picture shows."}),
                "negative": ("CONDITIONING", {"tooltip": "What it does not show. Ignored at cfg 1."}),
                "latent_image": ("LATENT", {"tooltip": "Where to start."}),
                "denoise": ("FLOAT", denoise | {"tooltip": "Below 1 the start shows through."}),
            }
        }

    def sample(self, model: Any, **inputs: Any) -> tuple[dict[str, Any]]:
        """Have the ranks run the loop."""
        return (sample(surroundings(), model, **inputs),)


def sample(here: Surroundings, model: Any, **widgets: Any) -> dict[str, Any]:
    """KSampler's work, with the whole loop in the ranks. Returns a LATENT."""
    inputs = SamplerInputs(**widgets)
    remote = here.remote_of(model)
    request, finish = here.sample_request(model, inputs)
    if len(request.sigmas) < 2:  # denoise 0: nothing to do, as in KSampler
        return inputs.latent_image
    show = here.progress(model, inputs.steps)
    with here.interruptible():
        answer = remote.sample(request, on_progress=show, interrupted=here.interrupted)
    return {**inputs.latent_image, "samples": finish(answer)}
