"""A loaded transformer, of diffusers' class or of ComfyUI's, and one call of it."""

from worker.models.comfyui.spreading import planned_classes
from worker.transformer.batch import OPTIONS, Batch, Pictures, join
from worker.transformer.controlnets import FittedControlNet, NetCall, NetSpec, same_nets
from worker.transformer.interface import Latents, LoadedTransformer, StagedTransformer
from worker.transformer.opening import open_transformer, prove_class
from worker.transformer.transformer import Transformer

__all__ = [
    "OPTIONS",
    "Batch",
    "FittedControlNet",
    "Latents",
    "LoadedTransformer",
    "NetCall",
    "NetSpec",
    "Pictures",
    "StagedTransformer",
    "Transformer",
    "join",
    "open_transformer",
    "planned_classes",
    "prove_class",
    "same_nets",
]
