"""Stand-ins for the stock nodes that text-to-image and image-to-image graphs are made of.

Same names, inputs and numbers as ComfyUI's, so that its workflows run without it. Node classes
here know their run by the hidden input FOLDERS.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from comfy_xdit.headless.folders import Folders, prefix_problem
from comfy_xdit.headless.surroundings import HEADLESS
from comfy_xdit.nodes.lora import add_lora
from comfy_xdit.nodes.sampler import MAX_SEED, sample

if TYPE_CHECKING:  # what a workflow may say is known before torch is imported, which takes seconds
    import torch

    from comfy_xdit.remote import RemoteModel, RemoteTextEncoders, RemoteVAE

MAX_SIDE = 16384
UPSCALE = ["nearest-exact", "bilinear", "area", "bicubic"]

Latent = dict[str, Any]


def _int(default: int, low: int, high: int, **more: Any) -> tuple[str, dict[str, Any]]:
    return "INT", {"default": default, "min": low, "max": high, **more}


def _text() -> tuple[str, dict[str, Any]]:
    return "STRING", {"default": "", "multiline": True}


class EmptyLatentImage:
    """An all-zero latent of 4 channels; a sampler gives it the channels its model takes."""

    CHANNELS, SMALLEST, RETURN_TYPES, FUNCTION = 4, 16, ("LATENT",), "generate"
    DEFAULT_SIDE = 512

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Width and height in pixels."""
        side = _int(cls.DEFAULT_SIDE, cls.SMALLEST, MAX_SIDE)
        return {"required": {"width": side, "height": side, "batch_size": _int(1, 1, 4096)}}

    def generate(self, width: int, height: int, batch_size: int) -> tuple[Latent]:
        """(batch, channels, height / 8, width / 8)."""
        import torch

        return ({"samples": torch.zeros(batch_size, self.CHANNELS, height // 8, width // 8)},)


class EmptySD3LatentImage(EmptyLatentImage):
    """An all-zero latent of 16 channels."""

    CHANNELS, DEFAULT_SIDE = 16, 1024


class CLIPTextEncode:
    """A prompt to CONDITIONING, by the text encoders in the ranks."""

    RETURN_TYPES, FUNCTION = ("CONDITIONING",), "encode"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Text with ComfyUI's weights, and who encodes it."""
        return {"required": {"text": _text(), "clip": ("CLIP",)}}

    def encode(self, text: str, clip: RemoteTextEncoders) -> tuple[list[Any]]:
        """[[context (1, T, D), {"pooled_output": (1, P) or None, and what else the model takes}]]."""
        return (encode_prompt(clip, text, {}),)


class CLIPTextEncodeFlux:
    """As CLIPTextEncode, with one prompt for each encoder, and guidance."""

    RETURN_TYPES, FUNCTION = ("CONDITIONING",), "encode"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """A prompt per encoder."""
        return {
            "required": {"clip": ("CLIP",), "clip_l": _text(), "t5xxl": _text(), "guidance": _guidance()},
        }

    def encode(self, clip: RemoteTextEncoders, clip_l: str, t5xxl: str, guidance: float) -> tuple[list[Any]]:
        """[[context, {"pooled_output", "guidance"}]]."""
        return (_with_option(encode_prompt(clip, "", {"l": clip_l, "t5xxl": t5xxl}), "guidance", guidance),)


class FluxGuidance:
    """Guidance that Flux takes as an input."""

    RETURN_TYPES, FUNCTION = ("CONDITIONING",), "append"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """How strongly the prompt counts."""
        return {"required": {"conditioning": ("CONDITIONING",), "guidance": _guidance()}}

    def append(self, conditioning: list[Any], guidance: float) -> tuple[list[Any]]:
        """The same conditioning with `guidance` in its options."""
        return (_with_option(conditioning, "guidance", guidance),)


class ConditioningZeroOut:
    """Conditioning that says nothing: all zeros."""

    RETURN_TYPES, FUNCTION = ("CONDITIONING",), "zero_out"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Any conditioning."""
        return {"required": {"conditioning": ("CONDITIONING",)}}

    def zero_out(self, conditioning: list[Any]) -> tuple[list[Any]]:
        """Zeros in place of context and pooled output."""
        import torch

        zeroed = []
        for context, options in conditioning:
            pooled = options.get("pooled_output")
            changed = {} if pooled is None else {"pooled_output": torch.zeros_like(pooled)}
            zeroed.append([torch.zeros_like(context), {**options, **changed}])
        return (zeroed,)


class KSampler:
    """ComfyUI's sampler node; here its loop runs in the ranks, with the same numbers."""

    RETURN_TYPES, FUNCTION = ("LATENT",), "sample"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Widgets in ComfyUI's order."""
        return {
            "required": {
                "model": ("MODEL",),
                "seed": _int(0, 0, MAX_SEED, control_after_generate=True),
                "steps": _int(20, 1, 10000),
                "cfg": ("FLOAT", {"default": 8.0, "min": 0.0, "max": 100.0}),
                "sampler_name": (HEADLESS.samplers(),),
                "scheduler": (HEADLESS.schedulers(),),
                "positive": ("CONDITIONING",),
                "negative": ("CONDITIONING",),
                "latent_image": ("LATENT",),
                "denoise": ("FLOAT", {"default": 1.0, "min": 0.0, "max": 1.0}),
            }
        }

    def sample(self, model: RemoteModel, **inputs: Any) -> tuple[Latent]:
        """Have the ranks run the loop."""
        latent, _ = sample(HEADLESS, model, **inputs)  # nothing is special of what runs here
        return (latent,)


class LoraLoaderModelOnly:
    """A LoRA on a MODEL; here the ranks read the file."""

    RETURN_TYPES, FUNCTION = ("MODEL",), "load_lora_model_only"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Widgets in ComfyUI's order."""
        strength = ("FLOAT", {"default": 1.0, "min": -100.0, "max": 100.0})
        return {
            "required": {
                "model": ("MODEL",),
                "lora_name": (HEADLESS.names("loras"),),
                "strength_model": strength,
            }
        }

    def load_lora_model_only(self, model: RemoteModel, lora_name: str, strength_model: float) -> tuple[Any]:
        """As XDiTLoraLoader."""
        return (add_lora(model, lora_name, strength_model, HEADLESS)[0],)


class VAEDecode:
    """Latents to pictures, by the VAE in the ranks."""

    RETURN_TYPES, FUNCTION = ("IMAGE",), "decode"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """A latent and a VAE."""
        return {"required": {"samples": ("LATENT",), "vae": ("VAE",)}}

    def decode(self, vae: RemoteVAE, samples: Latent) -> tuple[torch.Tensor]:
        """(B, C, H, W) to (B, H*8, W*8, 3) in 0..1."""
        pixels = HEADLESS.decode_latent(HEADLESS.remote_of(vae), samples["samples"], tile=0)
        return (pixels.reshape(-1, *pixels.shape[-3:]),)


class VAEEncode:
    """Pictures to latents, by the VAE in the ranks."""

    RETURN_TYPES, FUNCTION = ("LATENT",), "encode"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """A picture and a VAE."""
        return {"required": {"pixels": ("IMAGE",), "vae": ("VAE",)}}

    def encode(self, vae: RemoteVAE, pixels: torch.Tensor) -> tuple[Latent]:
        """(B, H, W, 3) in 0..1 to (B, C, H/8, W/8); what exceeds whole places is cut off all around."""
        from comfy_xdit.headless import pictures

        remote = HEADLESS.remote_of(vae)
        info = remote.info or remote.load(interrupted=HEADLESS.interrupted)
        cropped = pictures.cropped_to_multiple(pixels[..., :3], info["spatial_compression"])
        if info["temporal_compression"] is not None:
            cropped = cropped.unsqueeze(0 if info["batch_is_video"] else 1)
        return ({"samples": remote.encode(cropped, interrupted=HEADLESS.interrupted)},)


class SetLatentNoiseMask:
    """Only where the mask is white does the picture change."""

    RETURN_TYPES, FUNCTION = ("LATENT",), "set_mask"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """A latent and a mask."""
        return {"required": {"samples": ("LATENT",), "mask": ("MASK",)}}

    def set_mask(self, samples: Latent, mask: torch.Tensor) -> tuple[Latent]:
        """The same latent with `noise_mask` (B, 1, H, W)."""
        return ({**samples, "noise_mask": mask.reshape(-1, 1, *mask.shape[-2:])},)


class LatentUpscaleBy:
    """A latent made larger or smaller."""

    RETURN_TYPES, FUNCTION = ("LATENT",), "upscale"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """How, and by what factor."""
        scale = ("FLOAT", {"default": 1.5, "min": 0.01, "max": 8.0})
        return {"required": {"samples": ("LATENT",), "upscale_method": (UPSCALE,), "scale_by": scale}}

    def upscale(self, samples: Latent, upscale_method: str, scale_by: float) -> tuple[Latent]:
        """(B, C, H, W) to (B, C, H * scale_by, W * scale_by)."""
        import torch.nn.functional as F

        latent = samples["samples"]
        size = [max(1, round(side * scale_by)) for side in latent.shape[-2:]]
        return ({**samples, "samples": F.interpolate(latent, size=size, mode=upscale_method)},)


class ImageScale:
    """Pictures of another size."""

    RETURN_TYPES, FUNCTION = ("IMAGE",), "upscale"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Size in pixels; 0 keeps the proportion."""
        side = _int(512, 0, MAX_SIDE)
        return {
            "required": {
                "image": ("IMAGE",),
                "upscale_method": (UPSCALE,),
                "width": side,
                "height": side,
                "crop": (["disabled", "center"],),
            }
        }

    def upscale(
        self, image: torch.Tensor, upscale_method: str, width: int, height: int, crop: str
    ) -> tuple[torch.Tensor]:
        """(B, H, W, C) to (B, height, width, C)."""
        from comfy_xdit.headless import pictures

        return (pictures.resized(image, upscale_method, width, height, crop == "center"),)


class LoadImage:
    """A picture file to IMAGE and MASK (1 where it is transparent)."""

    RETURN_TYPES, FUNCTION = ("IMAGE", "MASK"), "load_image"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """A file name: beside the workflow, in the input folder, or a path."""
        return {"required": {"image": ("STRING", {"default": ""})}, "hidden": {"folders": "FOLDERS"}}

    def load_image(self, image: str, folders: Folders) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, H, W, 3) in 0..1 and (B, H, W)."""
        from comfy_xdit.headless import pictures

        return pictures.load(folders.find_input(image))


class SaveImage:
    """Pictures to PNG files with the workflow in them."""

    RETURN_TYPES, FUNCTION, OUTPUT_NODE = (), "save_images", True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Pictures, and how the files' names begin."""
        return {
            "required": {"images": ("IMAGE",), "filename_prefix": ("STRING", {"default": "ComfyUI"})},
            "hidden": {"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO", "folders": "FOLDERS"},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, filename_prefix: str = "ComfyUI") -> bool | str:
        """Whether files can be called so: known before anything runs."""
        return prefix_problem(filename_prefix) or True

    def save_images(
        self,
        images: torch.Tensor,
        filename_prefix: str,
        prompt: dict[str, Any],
        extra_pnginfo: dict[str, Any],
        folders: Folders,
    ) -> dict[str, Any]:
        """Write prefix_00001_.png, prefix_00002_.png ..."""
        from comfy_xdit.headless import pictures

        return {"ui": {"images": pictures.save(images, filename_prefix, folders, prompt, extra_pnginfo)}}


class PreviewImage(SaveImage):
    """Ends a graph as SaveImage does. There is no window to show it in, so it becomes a file as well."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Pictures."""
        inputs = super().INPUT_TYPES()
        return {**inputs, "required": {"images": inputs["required"]["images"]}}

    def save_images(self, images: torch.Tensor, **run: Any) -> dict[str, Any]:
        """Write ComfyUI_preview_00001_.png ..."""
        return super().save_images(images, "ComfyUI_preview", **run)


def encode_prompt(clip: RemoteTextEncoders, text: str, texts: dict[str, str]) -> list[Any]:
    """CONDITIONING for one text per encoder, by name; `text` is for those that `texts` does not name.

    Raises:
        InvalidInput: `clip` is none of the pack's, or a text names an embedding file.
    """
    from comfy_xdit.remote import parse_weights, refuse_embeddings

    remote = HEADLESS.remote_of(clip)
    for prompt in (text, *texts.values()):
        refuse_embeddings(prompt)
    info = remote.info or remote.load(interrupted=HEADLESS.interrupted)
    prompts = {name: [parse_weights(texts.get(name, text))] for name in info["encoders"]}
    context, pooled, options = remote.encode(prompts, interrupted=HEADLESS.interrupted)
    return [[context, {"pooled_output": pooled, **options}]]


def _guidance() -> tuple[str, dict[str, Any]]:
    return "FLOAT", {"default": 3.5, "min": 0.0, "max": 100.0}


def _with_option(conditioning: list[Any], name: str, value: Any) -> list[Any]:
    return [[context, {**options, name: value}] for context, options in conditioning]


NODES = (
    EmptyLatentImage, EmptySD3LatentImage, CLIPTextEncode, CLIPTextEncodeFlux, FluxGuidance,
    ConditioningZeroOut, LoraLoaderModelOnly, KSampler, VAEDecode, VAEEncode, SetLatentNoiseMask,
    LatentUpscaleBy, ImageScale, LoadImage, SaveImage, PreviewImage,
)  # fmt: skip
NODE_CLASS_MAPPINGS = {node.__name__: node for node in NODES}
