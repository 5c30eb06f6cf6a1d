"""Which kind of class a model runs as."""

from __future__ import annotations

from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.proofs import PATCHES, TOKENS, Proof
from comfy_xdit.protocol.spec import HostComfyUI, ModelSpec
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


def prove_class(name: str, host: HostComfyUI, groups: RankGroups) -> list[Proof]:
    """What came of proving the plan of a class on the host's ComfyUI, by each method.

    What is known to be right is not proven anew.

    Raises:
        InvalidInput: no such class has a plan, or there is one rank.
    """
    if groups.degrees.sequence == 1:
        raise InvalidInput("a plan is proven on two ranks or more: set ulysses_degree to 2.")
    import_comfyui(host, groups.device)
    from worker.models.comfyui.proof import prove

    return [prove(name, host, groups, method, again=True) for method in (TOKENS, PATCHES)]
