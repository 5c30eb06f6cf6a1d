"""A loaded transformer, of diffusers' class or of ComfyUI's, and one call of it."""

from worker.transformer.batch import Batch, Pictures, join
from worker.transformer.controlnets import FittedControlNet, NetCall, NetSpec, same_nets
from worker.transformer.interface import Latents, LoadedTransformer
from worker.transformer.opening import open_transformer
from worker.transformer.transformer import Transformer

__all__ = [
    "Batch",
    "FittedControlNet",
    "Latents",
    "LoadedTransformer",
    "NetCall",
    "NetSpec",
    "Pictures",
    "Transformer",
    "join",
    "open_transformer",
    "same_nets",
]
