"""XDiTSampler: KSampler whose loop runs in the ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from comfy_xdit.nodes.surroundings import RATIOS, SamplerInputs, Surroundings, surroundings
from comfy_xdit.protocol.errors import InvalidInput, NotInTheLoop
from comfy_xdit.protocol.spec import SAMPLERS

if TYPE_CHECKING:
    import torch

    from comfy_xdit.remote import RemoteModel

MAX_SEED = 0xFFFFFFFFFFFFFFFF
_NAMES = f"{', '.join(SAMPLERS[:-1])} and {SAMPLERS[-1]}"


class XDiTSampler:
    """KSampler whose loop runs in the ranks."""

    TITLE = "xDiT Sampler"
    DESCRIPTION = (
        "KSampler with the whole loop in the ranks: the same inputs and numbers, less overhead. "
        f"In the ranks: {', '.join(SAMPLERS)}; any other runs as in KSampler, and the node says so."
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
                "sampler_name": (
                    here.samplers(),
                    {"tooltip": f"{_NAMES} run in the ranks, others from here."},
                ),
                "scheduler": (here.schedulers(), {"tooltip": "How the noise falls from step to step."}),
                "positive": ("CONDITIONING", {"tooltip": "What the picture shows."}),
                "negative": ("CONDITIONING", {"tooltip": "What it does not show. Ignored at cfg 1."}),
                "latent_image": ("LATENT", {"tooltip": "Where to start."}),
                "denoise": ("FLOAT", denoise | {"tooltip": "Below 1 the start shows through."}),
            }
        }

    def sample(self, model: Any, **inputs: Any) -> Any:
        """Have the ranks run the loop; where they cannot, the host runs it, and the node says why."""
        latent, note = sample(surroundings(), model, **inputs)
        return {"ui": {"text": [note]}, "result": (latent,)} if note else (latent,)


def sample(here: Surroundings, model: Any, **widgets: Any) -> tuple[dict[str, Any], str]:
    """KSampler's work, with the whole loop in the ranks. Returns a LATENT, and what was special.

    Raises:
        InvalidInput: the ranks' loop cannot run this, and the layout allows no other.
    """
    inputs = SamplerInputs(**widgets)
    remote = here.remote_of(model)
    try:
        request, finish = here.sample_request(model, inputs)
    except NotInTheLoop as reason:
        stages = remote.parallel.pipefusion_degree
        if stages > 1:
            raise InvalidInput(
                f"{reason}; and with pipefusion_degree {stages} there is no other loop. Change that, or set "
                "pipefusion_degree to 1."
            ) from reason
        samples = here.drive(model, inputs)
        return _answer(inputs, samples), f"Sampled as KSampler does it: {reason}."
    if len(request.sigmas) < 2:  # denoise 0: nothing to do, as in KSampler
        return inputs.latent_image, ""
    show = here.progress(model, inputs.steps)
    with here.interruptible():
        answer = remote.sample(request, on_progress=show, interrupted=here.interrupted)
    return _answer(inputs, finish(answer)), _cost(remote)


def _cost(remote: RemoteModel) -> str:
    """What is special of a layout for a model, that one may not want."""
    described, stages = remote.described(), remote.parallel.pipefusion_degree
    if stages == 1 or not described.skips:
        return ""
    return (
        f"{described.family} reads outputs of early blocks in late ones: PipeFusion sends up to "
        f"{described.blocks // 2} of them between its {stages} stages with every patch, beside the one that "
        "other models send; ulysses_degree sends less."
    )


def _answer(inputs: SamplerInputs, samples: torch.Tensor) -> dict[str, Any]:
    """The LATENT with other samples, which are of the model's own size."""
    kept = {name: value for name, value in inputs.latent_image.items() if name not in RATIOS}
    return kept | {"samples": samples}
