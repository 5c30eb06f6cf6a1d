"""LoRA and other patches of a model's weights, by content and by file. Knows names of weights, no family."""

from worker.patches.adapters import patched
from worker.patches.lora_files import LoraFiles
from worker.patches.lora_names import WRITTEN_WITH_DOTS, WRITTEN_WITH_UNDERSCORES, LoraNames
from worker.patches.weights import COMPUTE_DTYPE, PatchedModel, PatchedWeights, PatchStore, Weights

__all__ = [
    "COMPUTE_DTYPE",
    "WRITTEN_WITH_DOTS",
    "WRITTEN_WITH_UNDERSCORES",
    "LoraFiles",
    "LoraNames",
    "PatchStore",
    "PatchedModel",
    "PatchedWeights",
    "Weights",
    "patched",
]
