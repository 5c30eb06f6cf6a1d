"""Any transformer of the ComfyUI that the host runs, as a model of the ranks. Here alone it is imported."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comfy_xdit.protocol.spec import ModelSpec
from worker.models.comfyui.installation import import_comfyui
from worker.parallel.groups import Degrees, RankGroups

if TYPE_CHECKING:
    from worker.models.comfyui.transformer import ComfyUITransformer


def open_transformer(spec: ModelSpec, groups: RankGroups, degrees: Degrees) -> ComfyUITransformer:
    """The transformer at `spec`, which names a ComfyUI; no weight is read yet.

    Raises:
        InvalidInput: that ComfyUI cannot be imported, does not know the file, or the layout is not for it.
    """
    import_comfyui(spec.comfyui, groups.device)
    from worker.models.comfyui.transformer import ComfyUITransformer

    return ComfyUITransformer(spec, groups, degrees)
