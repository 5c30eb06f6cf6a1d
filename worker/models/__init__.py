"""The families of diffusion transformers: one file and one line each."""

from comfy_xdit.protocol.errors import InvalidInput
from worker.checkpoints import Shapes
from worker.models.base import ModelFamily
from worker.models.flux.family import Flux
from worker.models.sd3.family import SD3

FAMILIES: tuple[ModelFamily, ...] = (SD3(), Flux())


def detect(shapes: Shapes, path: str) -> ModelFamily:
    """The family of a checkpoint with these tensors.

    Raises:
        InvalidInput: none of FAMILIES.
    """
    for family in FAMILIES:
        if family.detect(shapes):
            return family
    some = ", ".join(sorted(shapes)[:3])
    raise InvalidInput(
        f"{path} is of none of the families {', '.join(f.name for f in FAMILIES)}: its {len(shapes)} tensors "
        f"begin with {some}; choose a diffusion model of one of these families."
    )
