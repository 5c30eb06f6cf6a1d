"""ComfyUI's class of a file, without and with its weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import comfy.ops
import torch
from torch import nn

from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.outline import META, on_meta
from worker.models.comfyui.detection import Detected, Tensors, named

# Smaller parameters are built where they are computed, with the buffers that no file holds.
LARGE = 65_536  # elements
# Parameters that a layer sets to 1 itself, where the file does not scale it.
MADE_BY_LAYERS = (".scale_weight", ".scale_input")


def outline(detected: Detected) -> Any:
    """ComfyUI's BaseModel of the file with plain layers and no memory: names and shapes."""
    config = detected.config
    before, config.custom_operations = config.custom_operations, comfy.ops.disable_weight_init
    try:
        return on_meta(lambda: config.get_model(dict(detected.tensors), "", device=META))
    finally:
        config.custom_operations = before


def build(detected: Detected, device: torch.device, without_memory: bool = False) -> nn.Module:
    """The transformer on `device`, as ComfyUI builds it.

    Args:
        without_memory: large parameters are on the meta device.
    """
    with _large_on_meta() if without_memory else _as_built():
        model = detected.config.get_model(dict(detected.tensors), "", device=device)
    return model.diffusion_model.eval().requires_grad_(False)


def materialise(module: nn.Module, device: torch.device, but: Sequence[str]) -> None:
    """Give memory to every parameter that has none, but to those named."""
    for name, parameter in list(module.named_parameters()):
        if parameter.is_meta and name not in but:
            owner, _, leaf = name.rpartition(".")
            given = torch.empty_like(parameter, device=device)
            module.get_submodule(owner).register_parameter(leaf, nn.Parameter(given, requires_grad=False))


def fill(module: nn.Module, detected: Detected, path: str, elsewhere: Sequence[str] = ()) -> Tensors:
    """Copy the weights of the file into `module`, tensor after tensor.

    Args:
        elsewhere: names of parameters that are not written, but returned.

    Raises:
        InvalidInput: a parameter of the class is not in the file, or not in its shape.
    """
    tensors = named(detected)
    left = {name: tensors.pop(name) for name in elsewhere if name in tensors}
    try:
        missing, _ = module.load_state_dict(tensors, strict=False)
    except (RuntimeError, ValueError, KeyError) as error:  # ComfyUI's words for what does not fit
        raise InvalidInput(
            f"{path} does not fit ComfyUI's {type(module).__name__}: {_last_line(error)}; the file is "
            "damaged, or of a format that this ComfyUI does not know: download it again, or update ComfyUI."
        ) from error
    parameters = dict(module.named_parameters())
    lacking = [name for name in missing if name in parameters and name not in left]
    _check_lacking([*lacking, *(name for name in elsewhere if name not in left)], module, path)
    return left


def check_names(module: nn.Module, detected: Detected, path: str) -> None:
    """Raise InvalidInput for a file without a parameter of the whole class, or with another shape of one."""
    tensors = named(detected)
    _check_lacking([name for name, _ in module.named_parameters() if name not in tensors], module, path)
    for name, parameter in module.named_parameters():
        if not detected.quantised and name in tensors and tensors[name].shape != parameter.shape:
            raise InvalidInput(
                f"{path} does not fit ComfyUI's {type(module).__name__}: {name} has shape "
                f"{tuple(tensors[name].shape)}, not {tuple(parameter.shape)}; the file is damaged."
            )


def _last_line(error: Exception) -> str:
    """PyTorch begins with a headline and lists every tensor that does not fit."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()


def _check_lacking(names: Sequence[str], module: nn.Module, path: str) -> None:
    for name in names:
        if not name.endswith(MADE_BY_LAYERS):
            raise InvalidInput(
                f"{path} lacks the tensor {name} of ComfyUI's {type(module).__name__}; "
                "the file is incomplete: download it again."
            )


def blocks(module: nn.Module) -> list[str]:
    """Names of the modules that its outermost lists hold, in the order they were made.

    A list in which something is no module to be called is looked into.
    """
    found: list[str] = []

    def search(owner: nn.Module, prefix: str) -> None:
        for name, child in owner.named_children():
            path = f"{prefix}{name}"
            if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
                search_list(child, path)
            else:
                search(child, f"{path}.")

    def search_list(held: nn.Module, path: str) -> None:
        for name, child in held.named_children():
            if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
                search_list(child, f"{path}.{name}")
            elif any(True for _ in child.parameters()):
                found.append(f"{path}.{name}")

    search(module, "")
    return found


@contextmanager
def _as_built() -> Iterator[None]:
    yield


@contextmanager
def _large_on_meta() -> Iterator[None]:
    """Within, a large parameter loses its memory as soon as a module has it."""
    register = nn.Module.register_parameter

    def registered(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.numel() >= LARGE:
            parameter = nn.Parameter(parameter.detach().to(META), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = registered
    try:
        yield
    finally:
        nn.Module.register_parameter = register
