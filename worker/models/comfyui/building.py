"""ComfyUI's class of a file, without and with its weights."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import comfy.ops
import torch
from torch import nn

from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.outline import META, of_file, on_meta
from worker.models.comfyui.detection import Detected, named
from worker.models.comfyui.formats import MADE_BY_LAYERS, copied, fill_layers, make_weights

# Smaller parameters are built where they are computed, with the buffers that no file holds.
LARGE = 65_536  # elements
# Containers that are never called: their owner calls what they hold, one after the other.
UNCALLED = ("TimestepEmbedSequential",)


def outline(detected: Detected, path: str) -> Any:
    """ComfyUI's BaseModel of the file with plain layers and no memory: names and shapes.

    Raises:
        InvalidInput: the class cannot be built from what the file has.
    """
    config = detected.config
    before, config.custom_operations = config.custom_operations, comfy.ops.disable_weight_init
    try:
        with of_file(path):
            return on_meta(lambda: detected.model(META))
    finally:
        config.custom_operations = before


def formatted_outline(detected: Detected, path: str) -> nn.Module:
    """The transformer without memory, its weights in the formats that the file has them in."""
    if not detected.quantised:
        return _packed(outline(detected, path).diffusion_model, detected)
    model = on_meta(lambda: detected.config.get_model(dict(detected.tensors), "", device=META))
    make_weights(model.diffusion_model, named(detected))
    return model.diffusion_model


def build(detected: Detected, device: torch.device, without_memory: bool = False) -> nn.Module:
    """The transformer on `device`, as ComfyUI builds it.

    Args:
        without_memory: large parameters are on the meta device.
    """
    with _large_on_meta() if without_memory else _as_built():
        model = detected.model(device)
    return _packed(model.diffusion_model, detected).eval().requires_grad_(False)


def _packed(module: nn.Module, detected: Detected) -> nn.Module:
    """With parameters that stay packed, and have no memory yet, where the file has them so."""
    if detected.packed:
        from worker.models.comfyui.packed import declare  # of a package that no other file needs

        declare(module, named(detected))
    return module


def materialise(module: nn.Module, device: torch.device, but: Collection[str]) -> None:
    """Give memory to every parameter that has none, but to those named."""
    for name, parameter in list(module.named_parameters()):
        if parameter.is_meta and name not in but:
            owner, _, leaf = name.rpartition(".")
            made = torch.ones_like if name.endswith(MADE_BY_LAYERS) else torch.empty_like
            given = made(parameter, device=device)
            module.get_submodule(owner).register_parameter(leaf, nn.Parameter(given, requires_grad=False))


def fill(
    module: nn.Module, detected: Detected, path: str, elsewhere: Sequence[str] = ()
) -> Iterator[tuple[str, torch.Tensor]]:
    """Copy the weights of the file into `module`, tensor after tensor; to be exhausted.

    Args:
        elsewhere: names of parameters that are not written, but yielded, each with its tensor.

    Raises:
        InvalidInput: a parameter of the class is not in the file, or not in its shape.
    """
    try:
        if detected.quantised and elsewhere:
            for name, tensor in fill_layers(module, named(detected), elsewhere, _is_on_cpu(module)):
                if tensor is None:
                    _check_lacking([name], module, path)
                elif name in elsewhere:
                    yield name, tensor
            return
        yield from _fill(module, detected, path, elsewhere)
    except (RuntimeError, ValueError, KeyError) as error:  # ComfyUI's words for what does not fit
        if isinstance(error, InvalidInput):
            raise
        raise InvalidInput(
            f"{path} does not fit ComfyUI's {type(module).__name__}: {_last_line(error)}; the file is "
            "damaged, or of a format that this ComfyUI does not know: download it again, or update ComfyUI."
        ) from error


def _fill(
    module: nn.Module, detected: Detected, path: str, elsewhere: Sequence[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    tensors = named(detected)
    left = {name: tensors.pop(name) for name in elsewhere if name in tensors}
    if detected.quantised and _is_on_cpu(module):
        layers = dict(module.named_modules())  # a stage has some of them
        tensors = {n: copied(t) if n.rpartition(".")[0] in layers else t for n, t in tensors.items()}
    missing, _ = module.load_state_dict(tensors, strict=False)
    parameters = dict(module.named_parameters())
    lacking = [name for name in missing if name in parameters and name not in left]
    _check_lacking([*lacking, *(name for name in elsewhere if name not in left)], module, path)
    for name, tensor in left.items():
        _check_shape(name, tensor, parameters[name], module, path)
    yield from left.items()


def _is_on_cpu(module: nn.Module) -> bool:
    """Where layers in formats of their own take tensors as they are, and a view changes with its file."""
    return any(parameter.is_cpu for parameter in module.parameters())


def check_names(module: nn.Module, detected: Detected, path: str) -> None:
    """Raise InvalidInput for a file without a parameter of the whole class, or with another shape of one."""
    tensors = named(detected)
    _check_lacking([name for name, _ in module.named_parameters() if name not in tensors], module, path)
    for name, parameter in module.named_parameters():
        if not detected.quantised and name in tensors:
            _check_shape(name, tensors[name], parameter, module, path)


def _check_shape(
    name: str, tensor: torch.Tensor, parameter: nn.Parameter, module: nn.Module, path: str
) -> None:
    one = parameter.ndim == 0 and tensor.numel() == 1  # stored as a row of one, which is taken for it
    if tensor.shape != parameter.shape and not one:
        raise InvalidInput(
            f"{path} does not fit ComfyUI's {type(module).__name__}: {name} has shape "
            f"{tuple(tensor.shape)}, not {tuple(parameter.shape)}; the file is damaged."
        )


def _last_line(error: Exception) -> str:
    """PyTorch begins with a headline and lists every tensor that does not fit."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()


def _check_lacking(names: Sequence[str], module: nn.Module, path: str) -> None:
    """Raise InvalidInput for the first of these parameters that no layer makes itself."""
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

    def is_list(child: nn.Module) -> bool:
        return isinstance(child, (nn.ModuleList, nn.ModuleDict)) or type(child).__name__ in UNCALLED

    found: list[str] = []

    def search(owner: nn.Module, prefix: str) -> None:
        for name, child in owner.named_children():
            path = f"{prefix}{name}"
            if is_list(child):
                search_list(child, path)
            else:
                search(child, f"{path}.")

    def search_list(held: nn.Module, path: str) -> None:
        for name, child in held.named_children():
            if is_list(child):
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
