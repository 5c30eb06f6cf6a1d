"""Which kind of class a model runs as."""

from __future__ import annotations

from comfy_xdit.protocol.spec import ModelSpec
from worker.models import in_diffusers
from worker.models.comfyui.installation import import_comfyui
from worker.parallel import Degrees, RankGroups
from worker.transformer.interface import LoadedTransformer
from worker.transformer.transformer import Transformer


def open_transformer(spec: ModelSpec, groups: RankGroups, degrees: Degrees) -> LoadedTransformer:
    """The transformer at `spec`; no weight is read yet.

    It is of ComfyUI's class if it names a ComfyUI, unless a family here covers what that calls the model.

    Raises:
        InvalidInput: the file or the layout is not for it; or that ComfyUI cannot be imported.
    """
    if spec.comfyui is None or in_diffusers(spec.configuration):
        return Transformer(spec, groups, degrees)
    import_comfyui(spec.comfyui, groups.device)
    from worker.transformer.comfyui import ComfyUITransformer  # which imports ComfyUI

    return ComfyUITransformer(spec, groups, degrees)
