"""The calls of a twin whose class runs in the ranks too: they travel with exactly the arguments they have."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from typing import Any

import torch

from comfy_xdit.comfy_types.interruption import interrupted, interruptible, raise_if_interrupted
from comfy_xdit.comfy_types.model.controlnet import NETS
from comfy_xdit.comfy_types.model.options import plain_options
from comfy_xdit.comfy_types.model.original import ORIGINAL
from comfy_xdit.comfy_types.model.residuals import OF_CLASSES, residuals
from comfy_xdit.protocol.description import ModelDescription
from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.remote import RemoteModel

_NONE = object()
OPTIONS = "transformer_options"


def answer_for(remote: RemoteModel, twin: Any, described: ModelDescription) -> None:
    """Have the ranks do what the twin's transformer is asked for.

    The innermost method is replaced, so that ComfyUI's wrappers around it stay. The ranks call the same one
    (worker/transformer/comfyui.py).
    """
    transformer = twin.diffusion_model
    name = "_forward" if hasattr(transformer, "_forward") else "forward"
    answers = {name: _forward(remote, twin, getattr(transformer, name), described.remade)}
    answers |= {method: _around(remote, method) for method in described.around}
    answers |= dict.fromkeys(described.keeping, _keeping(type(transformer).__name__))
    for method, answer in answers.items():
        if hasattr(transformer, method):
            # Instance attributes: nn.Module.__setattr__ would do the same, more slowly.
            object.__setattr__(transformer, method, answer)


def _forward(
    remote: RemoteModel, twin: Any, method: Callable[..., Any], remade: tuple[str, ...]
) -> Callable[..., Any]:
    """What is called instead of `method`, the transformer's own."""
    of_class = type(twin.diffusion_model).__name__
    owner = weakref.ref(twin)  # a strong one would be a cycle, and it outlive its MODELs
    signature = inspect.signature(method)
    # What the class would take anyway stays here: it may be no plain data.
    defaults = {key: parameter.default for key, parameter in signature.parameters.items()}

    def forward(*args: Any, **kwargs: Any) -> Any:
        twin = owner()
        getattr(twin, ORIGINAL).refuse_changes(twin)
        x, timestep, given = arguments(signature, args, kwargs)
        given = {key: value for key, value in given.items() if value is not defaults.get(key, _NONE)}
        for argument, entry in (name.split(".") for name in remade):
            if isinstance(given.get(argument), dict):
                given[argument] = {k: v for k, v in given[argument].items() if k != entry}
        options = given.pop(OPTIONS, None) or {}
        if options.get(NETS):
            raise InvalidInput(
                "a ControlNet in the ranks needs diffusers' class of a model, and "
                f"{of_class} runs in ComfyUI's own; use a stock ControlNet loader and "
                "'Apply ControlNet'."
            )
        control = residuals(given.pop("control", None), OF_CLASSES)
        conditions = given | {OPTIONS: plain_options(options)}
        _refuse_empty([x, timestep, conditions], of_class)
        raise_if_interrupted()
        with interruptible():
            out = remote.denoise(x, timestep, conditions, interrupted=interrupted, control=control)
        return _to(out, (x if isinstance(x, torch.Tensor) else x[0]).device)

    return forward


def _around(remote: RemoteModel, method: str) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        raise_if_interrupted()
        with interruptible():
            out = remote.preprocess(method, args, kwargs, interrupted=interrupted)
        return _to(out, next(a for a in args if isinstance(a, torch.Tensor)).device)

    return call


def _keeping(of_class: str) -> Callable[..., Any]:
    def refuse(*_: Any, **__: Any) -> Any:
        raise InvalidInput(
            f"this sampler draws a video part by part, and keeps keys of {of_class} from call to call; they "
            "do not travel to the ranks. Use another sampler, or the stock loader."
        )

    return refuse


def arguments(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Any, dict[str, Any]]:
    """Latents, timestep and the other arguments of one call, under the names the class gives them."""
    given = dict(signature.bind(*args, **kwargs).arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            given |= given.pop(parameter.name, {})
    x, timestep = (given.pop(name) for name in list(signature.parameters)[:2])
    return x, timestep, given


def _refuse_empty(values: Any, of_class: str) -> None:
    """Raise InvalidInput for a tensor that was computed with the twin's weights, which it has not."""
    if isinstance(values, torch.Tensor) and values.is_meta:
        raise InvalidInput(
            f"this ComfyUI computes with weights of {of_class} before it calls it, which "
            "is not in this version of comfy_xdit. Use the stock loader."
        )
    if isinstance(values, (list, tuple, dict)):
        for value in values.values() if isinstance(values, dict) else values:
            _refuse_empty(value, of_class)


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    return type(value)(_to(part, device) for part in value)
