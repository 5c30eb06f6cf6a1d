"""The host side of the pack and the vocabulary both sides share. Imports neither ComfyUI nor xfuser."""

__version__ = "0.1.0"
