"""The twin: ComfyUI's own model class over meta tensors, which has every shape and no weight.

It gives the latent format, the noise schedule, the extra conditioning and the LoRA keys of a model
whose weights are in the ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.ops
import torch

from comfy_xdit.comfy_types.model.detection import Detected, detect, transformer_files
from comfy_xdit.comfy_types.model.residuals import lend_embedders
from comfy_xdit.comfy_types.model.weights import take_away
from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.outline import META, asks_for_numbers, of_file, on_meta

TRANSFORMER = "diffusion_model"  # its name in a BaseModel


def build_twin(
    path: str | Path, dtype: torch.dtype, manual_cast: torch.dtype | None = None, checkpoint: bool = False
) -> Any:
    """ComfyUI's BaseModel for the transformer at `path`, on the meta device.

    Args:
        path: a safetensors or GGUF file, a diffusers transformer folder, or a pipeline that has one.
        dtype: what ComfyUI casts the transformer's inputs to, unless there is a `manual_cast`.
        checkpoint: as ComfyUI's checkpoint loader builds it: what it predicts may stand around it there.

    Raises:
        InvalidInput: this ComfyUI does not know the family, or the file is damaged.
    """

    def built(detected: Detected) -> Any:
        config = detected.config
        config.set_inference_dtype(dtype, manual_cast)
        config.custom_operations = _twin_operations()
        with of_file(path):
            return on_meta(lambda: config.get_model(dict(detected.given), detected.prefix, device=META))

    try:
        twin = built(detect(Path(path), checkpoint))
    except RuntimeError as error:
        if not asks_for_numbers(error):
            raise
        twin = built(detect(Path(path), checkpoint, numbers=True))
    emptied(twin)
    lend_embedders(twin.diffusion_model, transformer_files(Path(path)))
    return twin


def emptied(twin: Any) -> Any:
    """A BaseModel without the numbers of its weights, and without need of memory."""
    _keep_copies(twin)
    # Shared by all clones. Nothing of this model needs the host's memory, and a host without any
    # free still gets positive and negative in one call.
    twin.memory_required = lambda *_, **__: 0
    twin.state_dict_for_saving = _refuse_saving
    take_away(twin, TRANSFORMER)
    return twin


def _keep_copies(twin: torch.nn.Module) -> None:
    """Have nothing of the twin lie in the memory map of a file, which may be cut off under it."""
    for name, parameter in twin.named_parameters():
        if not name.startswith(TRANSFORMER):
            parameter.data = parameter.data.clone()


def _twin_operations() -> type:
    """Layer classes that have parameters on every host.

    A host with ComfyUI's dynamic VRAM creates layers without weights, and LoRA then finds nothing
    to attach to; layer classes with a `_load_from_state_dict` of their own are spared that.
    """
    stock = comfy.ops.disable_weight_init
    layers = {
        name: type(name, (layer,), {"_load_from_state_dict": _loading_like(layer)})
        for name, layer in vars(stock).items()
        if isinstance(layer, type) and issubclass(layer, torch.nn.Module)
    }
    return type("TwinOperations", (stock,), layers)


def _loading_like(layer: type) -> Callable[..., None]:
    def _load_from_state_dict(self: Any, *args: Any, **kwargs: Any) -> None:
        layer._load_from_state_dict(self, *args, **kwargs)

    return _load_from_state_dict


def _refuse_saving(*_: Any, **__: Any) -> None:
    raise InvalidInput(
        "the weights of an xDiT MODEL are in the ranks, so it cannot be saved or merged; "
        "load it with a stock loader node for that."
    )
