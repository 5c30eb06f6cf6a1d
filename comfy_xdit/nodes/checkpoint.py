"""The node that loads a checkpoint: a diffusion model with its text encoders and its VAE in one file."""

from __future__ import annotations

from typing import Any

from comfy_xdit.nodes.loaders import PARALLEL, WEIGHT_DTYPE, loaded, planned
from comfy_xdit.nodes.surroundings import check_name, surroundings
from comfy_xdit.protocol.parallel import Automatic, ParallelConfig
from comfy_xdit.protocol.spec import ModelSpec

FOLDER = "checkpoints"


class XDiTLoadCheckpoint:
    """MODEL in the ranks, CLIP and VAE of the same file in ComfyUI."""

    TITLE = "xDiT Load Checkpoint"
    DESCRIPTION = (
        "Loads the diffusion model of a checkpoint into the ranks; its CLIP and VAE are stock ones. Drop-in "
        "for Load Checkpoint (CheckpointLoaderSimple)."
    )
    RETURN_TYPES = ("MODEL", "CLIP", "VAE")
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """CheckpointLoaderSimple's one widget; a prompt made for that has no other."""
        choices, words = WEIGHT_DTYPE
        return {
            "required": {
                "ckpt_name": (surroundings().names(FOLDER), {"tooltip": "Files in models/checkpoints."})
            },
            "optional": {"weight_dtype": (choices, words | {"default": choices[0]}), "parallel": PARALLEL},
        }

    @classmethod
    def IS_CHANGED(cls, ckpt_name: str, **_: Any) -> tuple[int, int]:
        """Another file under the same name is another checkpoint."""
        return ModelSpec.of(surroundings().path(FOLDER, ckpt_name), "transformer").stamp

    @classmethod
    def VALIDATE_INPUTS(cls, ckpt_name: str | None = None) -> bool | str:
        """Whether the file is one to choose, or why not."""
        return check_name(FOLDER, ckpt_name)

    def load(
        self,
        ckpt_name: str,
        weight_dtype: str = "default",
        parallel: ParallelConfig | Automatic | None = None,
    ) -> tuple[Any, Any, Any]:
        """Have the ranks load the diffusion model: what they refuse is said before text encoders are read."""
        from comfy_xdit.remote import RemoteModel

        here = surroundings()
        spec = here.spec_of(here.path(FOLDER, ckpt_name), weight_dtype, checkpoint=True)
        layout = planned(parallel, spec, here)
        remote = loaded(RemoteModel(spec, layout), here)
        return here.model_of(remote), *here.clip_and_vae(spec)
