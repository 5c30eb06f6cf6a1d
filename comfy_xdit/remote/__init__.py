"""Light handles of what runs in the ranks: models, text encoders, VAEs, and what is added to them."""

from comfy_xdit.remote.base import Remote
from comfy_xdit.remote.controlnet import (
    Application,
    RemoteControlNet,
    check_mode,
    checked_application,
    mode_of,
)
from comfy_xdit.remote.hints import check_picture
from comfy_xdit.remote.ip_adapter import PicturePrompt, at_sigmas, negative_rows
from comfy_xdit.remote.model import RemoteModel
from comfy_xdit.remote.patches import file_patch, patch_set, with_file
from comfy_xdit.remote.prompt import parse_weights, refuse_embeddings
from comfy_xdit.remote.schedulers import sigmas_of
from comfy_xdit.remote.text import RemoteTextEncoders
from comfy_xdit.remote.vae import RemoteVAE

__all__ = [
    "Application",
    "PicturePrompt",
    "Remote",
    "RemoteControlNet",
    "RemoteModel",
    "RemoteTextEncoders",
    "RemoteVAE",
    "at_sigmas",
    "check_mode",
    "check_picture",
    "checked_application",
    "file_patch",
    "mode_of",
    "negative_rows",
    "parse_weights",
    "patch_set",
    "refuse_embeddings",
    "sigmas_of",
    "with_file",
]
