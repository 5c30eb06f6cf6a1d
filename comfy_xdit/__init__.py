"""The host side of the pack and the vocabulary both sides share. Imports neither ComfyUI nor xfuser."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # of the pack
__version__ = "0.1.0"
