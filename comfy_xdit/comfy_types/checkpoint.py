"""CLIP and VAE of a checkpoint: stock ones, read as ComfyUI's own checkpoint loader reads them."""

from __future__ import annotations

from typing import Any

import comfy.sd
import folder_paths

from comfy_xdit.protocol.spec import ModelSpec


def clip_and_vae(spec: ModelSpec) -> tuple[Any, Any]:
    """The CLIP in a diffusion model's file, None where it has none, and the VAE, one that raises when used.

    The diffusion model is not built, and its weights are not read: those are the ranks'.

    Raises:
        InvalidInput: the file was changed since `spec` was made.
    """
    if not spec.checkpoint:  # as stock, for a file with a diffusion model alone
        return None, comfy.sd.VAE(sd={})
    _, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(
        spec.path,
        output_vae=True,
        output_clip=True,
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        output_model=False,
    )
    spec.check()  # half of one file and half of another is neither
    return clip, vae
