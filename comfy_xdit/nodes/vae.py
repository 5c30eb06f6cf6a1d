"""The nodes for a VAE in the ranks."""

from __future__ import annotations

from typing import Any

from comfy_xdit.nodes.loaders import PARALLEL, loaded
from comfy_xdit.nodes.surroundings import check_name, surroundings
from comfy_xdit.protocol.parallel import Automatic, ParallelConfig
from comfy_xdit.protocol.spec import ModelSpec

TILES = {"none": 0, "1024 px": 1024, "512 px": 512, "256 px": 256}


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
        return {
            "required": {"vae_name": (surroundings().names("vae"), file)},
            "optional": {"parallel": PARALLEL},
        }

    @classmethod
    def IS_CHANGED(cls, vae_name: str, **_: Any) -> tuple[int, int]:
        """Another file under the same name is another VAE."""
        return ModelSpec.of(surroundings().path("vae", vae_name), "vae").stamp

    @classmethod
    def VALIDATE_INPUTS(cls, vae_name: str | None = None) -> bool | str:
        """Whether the file is one to choose, or why not."""
        return check_name("vae", vae_name)

    def load(self, vae_name: str, parallel: ParallelConfig | Automatic | None = None) -> tuple[Any]:
        """Start the ranks if need be, and have them load."""
        from comfy_xdit.planning.auto import layout_beside
        from comfy_xdit.remote import RemoteVAE

        here = surroundings()
        spec = ModelSpec.of(here.path("vae", vae_name), "vae")
        layout = layout_beside(Automatic() if parallel is None else parallel)
        return (here.vae_of(loaded(RemoteVAE(spec, layout), here)),)


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
        """IMAGE (B, H, W, 3) in 0..1; what was special (memory ran out, say) is shown on the node."""
        here = surroundings()
        remote = here.remote_of(vae)  # a stock VAE is refused by name
        pixels = here.decode_latent(vae, samples["samples"], TILES[tiling])
        image = pixels.reshape(-1, *pixels.shape[-3:])
        return {"ui": {"text": [remote.note]}, "result": (image,)} if remote.note else (image,)
