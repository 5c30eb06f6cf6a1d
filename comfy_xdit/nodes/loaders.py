"""The nodes that load a diffusion model, alone or with all of its pipeline."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from comfy_xdit.nodes.surroundings import Surroundings, check_name, surroundings
from comfy_xdit.protocol.parallel import Automatic, ParallelConfig
from comfy_xdit.protocol.spec import WEIGHT_DTYPES, ModelSpec

if TYPE_CHECKING:
    from comfy_xdit.remote import Remote

PARALLEL = ("XDIT_PARALLEL", {"tooltip": "From 'xDiT Parallel Config'. Without it: all GPUs."})
WEIGHT_DTYPE = (list(WEIGHT_DTYPES), {"tooltip": "default: as in the file on a GPU, fp32 on CPU."})
Handle = TypeVar("Handle", bound="Remote")


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
            "required": {
                "pipeline": (surroundings().names("diffusers"), folder),
                "weight_dtype": WEIGHT_DTYPE,
            },
            "optional": {"parallel": PARALLEL},
        }

    @classmethod
    def IS_CHANGED(cls, pipeline: str, **_: Any) -> tuple[int, int]:
        """Another file in the folder makes another model."""
        return ModelSpec.of(surroundings().path("diffusers", pipeline), "transformer").stamp

    def load(
        self, pipeline: str, weight_dtype: str, parallel: ParallelConfig | Automatic | None = None
    ) -> tuple[Any, Any, Any]:
        """Start the ranks if need be, and have them load."""
        from comfy_xdit.remote import RemoteModel, RemoteTextEncoders, RemoteVAE

        here = surroundings()
        folder = here.path("diffusers", pipeline)
        layout = planned(parallel, ModelSpec.of(folder, "transformer", weight_dtype), here)

        def handle(kind: str, remote: type[Handle]) -> Handle:
            return loaded(remote(ModelSpec.of(folder, kind, weight_dtype), layout), here)

        return (
            here.model_of(handle("transformer", RemoteModel)),
            here.clip_of(handle("text_encoders", RemoteTextEncoders)),
            here.vae_of(handle("vae", RemoteVAE)),
        )


class XDiTLoadDiffusionModel:
    """MODEL from one file."""

    TITLE = "xDiT Load Diffusion Model"
    DESCRIPTION = "Loads a diffusion model into the ranks. Drop-in for Load Diffusion Model (UNETLoader)."
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Widgets in their order."""
        file = {"tooltip": "Files in models/diffusion_models and models/unet, GGUF too, and the pack's demo."}
        return {
            "required": {
                "unet_name": (surroundings().names("diffusion_models"), file),
                "weight_dtype": WEIGHT_DTYPE,
            },
            "optional": {"parallel": PARALLEL},
        }

    @classmethod
    def IS_CHANGED(cls, unet_name: str, **_: Any) -> tuple[int, int]:
        """Another file under the same name is another model."""
        return ModelSpec.of(surroundings().path("diffusion_models", unet_name), "transformer").stamp

    @classmethod
    def VALIDATE_INPUTS(cls, unet_name: str | None = None) -> bool | str:
        """Whether the file is one to choose, or why not."""
        return check_name("diffusion_models", unet_name)

    def load(
        self, unet_name: str, weight_dtype: str, parallel: ParallelConfig | Automatic | None = None
    ) -> tuple[Any]:
        """Start the ranks if need be, and have them load."""
        from comfy_xdit.remote import RemoteModel

        here = surroundings()
        spec = here.spec_of(here.path("diffusion_models", unet_name), weight_dtype)
        layout = planned(parallel, spec, here)
        return (here.model_of(loaded(RemoteModel(spec, layout), here)),)


def loaded(remote: Handle, here: Surroundings) -> Handle:
    """The handle, once its spec is in the ranks: a bad file is an error of the loader node."""
    here.begin()
    with here.interruptible():
        remote.load(interrupted=here.interrupted)
    return remote


def planned(
    parallel: ParallelConfig | Automatic | None, spec: ModelSpec, here: Surroundings
) -> ParallelConfig:
    """The layout for the transformer `spec`: the one that is given, or the planner's."""
    from comfy_xdit.planning.auto import layout_of

    here.begin()
    with here.interruptible():
        return layout_of(Automatic() if parallel is None else parallel, spec, here.interrupted)
