"""Ways in which nodes of other packs change a MODEL, as they do it; each for the time of a `with`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

MORE = 2.0  # by which what is changed is larger
BLOCKS = {"sd3": "joint_blocks", "flux": "double_blocks"}
CORE = {"sd3": "forward_core_with_concat", "flux": "forward_orig"}
LAYER = {"sd3": "y_embedder.mlp.0", "flux": "img_in"}
ATTENTION = {"sd3": "comfy.ldm.modules.diffusionmodules.mmdit", "flux": "comfy.ldm.flux.math"}
SAMPLING = {
    "sd3": ("ModelSamplingSD3", {"shift": 5.0}),
    "flux": ("ModelSamplingFlux", {"max_shift": 2.0, "base_shift": 1.0, "width": 64, "height": 64}),
}


@dataclass(frozen=True)
class Scene:
    """What is changed: a MODEL of a family, ours or the stock one; how to run a node, and prompts for it."""

    model: Any
    family: str
    run_node: Callable[..., tuple[Any, ...]]
    prompts: tuple[Any, Any]

    @property
    def transformer(self) -> Any:
        """It."""
        return self.model.model.diffusion_model

    @property
    def block(self) -> Any:
        """Its first."""
        return getattr(self.transformer, BLOCKS[self.family])[0]

    @property
    def layer(self) -> Any:
        """One with a weight."""
        return self.transformer.get_submodule(LAYER[self.family])


@dataclass(frozen=True)
class Way:
    """One.

    Args:
        change: gives the MODEL to sample with.
        refused: whether our MODEL must be; otherwise it must draw what the stock one does.
        draws: "other" pictures with the stock MODEL, or "same" ones, or "any": either, by class and version;
            or "none": it is not asked, as it needs a compiler there, or computes in fp16 on a CPU.
    """

    change: Callable[[Scene], AbstractContextManager[Any]]
    refused: bool = True
    draws: str = "other"


def more(function: Callable[..., Any]) -> Callable[..., Any]:
    """As `function`, with all that it gives made larger."""

    def larger(*args: Any, **kwargs: Any) -> Any:
        return _larger(function(*args, **kwargs))

    return larger


def method(function: Callable[..., Any]) -> Callable[..., Any]:
    """As `more`, for a class."""

    def larger(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _larger(function(self, *args, **kwargs))

    return larger


def _larger(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value * MORE
    return tuple(map(_larger, value)) if isinstance(value, tuple) else value


class Larger(torch.nn.Module):
    """A module in the place of another, whose attributes it has: as torch.compile gives one."""

    def __init__(self, inner: torch.nn.Module):
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return _larger(self.inner(*args, **kwargs))


# ---------------------------------------------------------------------- on one model


@contextmanager
def over(scene: Scene, owner: Any, name: str) -> Iterator[Any]:
    with mock.patch.object(owner, name, more(getattr(owner, name))):
        yield scene.model


@contextmanager
def in_place(scene: Scene, change: Callable[[], Any]) -> Iterator[Any]:
    """For good: every test has a model of its own."""
    change()
    yield scene.model


@contextmanager
def hooked(scene: Scene, register: Callable[..., Any]) -> Iterator[Any]:
    def larger(module: Any, _given: Any, out: Any) -> Any:
        return _larger(out) if type(module).__name__ == type(scene.layer).__name__ else None

    handle = register(larger)
    try:
        yield scene.model
    finally:
        handle.remove()


def _replace(scene: Scene) -> None:
    scene.layer.weight = torch.nn.Parameter(torch.zeros(scene.layer.weight.shape), requires_grad=False)


# ---------------------------------------------------------------------- on every model of a class


@contextmanager
def of_class(scene: Scene, owner: type, name: str) -> Iterator[Any]:
    with mock.patch.object(owner, name, method(getattr(owner, name))):
        yield scene.model


# ---------------------------------------------------------------------- on a clone, as ComfyUI means it


@contextmanager
def cloned(scene: Scene, change: Callable[[Any], Any]) -> Iterator[Any]:
    model = scene.model.clone()
    change(model)
    yield model


@contextmanager
def by_node(scene: Scene, name: str, **inputs: Any) -> Iterator[Any]:
    yield scene.run_node(name, model=scene.model, **inputs)[0]


def for_a_call(scene: Scene, owner: Any, name: str, new: Any) -> AbstractContextManager[Any]:
    """By a model function wrapper, which puts everything back."""

    def wrapper(apply_model: Any, args: dict[str, Any]) -> Any:
        with mock.patch.object(owner, name, new):
            return apply_model(args["input"], args["timestep"], **args["c"])

    return cloned(scene, lambda model: model.set_model_unet_function_wrapper(wrapper))


def _around(apply_model: Any, args: dict[str, Any]) -> Any:
    return apply_model(args["input"], args["timestep"], **args["c"]) * MORE


def _wrapped(executor: Any, *args: Any, **kwargs: Any) -> Any:
    return _larger(executor(*args, **kwargs))


def _attention(function: Any, *args: Any, **kwargs: Any) -> Any:
    return _larger(function(*args, **kwargs))


def _block(args: dict[str, Any], more_args: dict[str, Any]) -> dict[str, Any]:
    out = more_args["original_block"](args)
    return {name: _larger(value) for name, value in out.items()}


def _diff(scene: Scene) -> dict[str, Any]:
    shape = scene.layer.weight.shape
    change = torch.randn(shape, generator=torch.Generator().manual_seed(5)) * 0.1
    return {f"diffusion_model.{LAYER[scene.family]}.weight": ("diff", (change,))}


WAYS: dict[str, Way] = {
    "`dm.forward_orig = f`, `dm.forward_core_with_concat = f`": Way(
        lambda s: over(s, s.transformer, CORE[s.family])
    ),
    "`dm.forward = f`": Way(lambda s: over(s, s.transformer, "forward")),
    "`block.forward = f`": Way(lambda s: over(s, s.block, "forward")),
    "`block.register_forward_hook(f)`": Way(lambda s: hooked(s, s.layer.register_forward_hook)),
    "`torch.nn.modules.module.register_module_forward_hook(f)`": Way(
        lambda s: hooked(s, torch.nn.modules.module.register_module_forward_hook)
    ),
    "`dm.final_layer = Other()`": Way(
        lambda s: in_place(
            s, lambda: setattr(s.transformer, "final_layer", Larger(s.transformer.final_layer))
        )
    ),
    "a block taken out of `dm.double_blocks`, `dm.joint_blocks`": Way(
        lambda s: in_place(s, lambda: getattr(s.transformer, BLOCKS[s.family]).pop(0))
    ),
    "`model.diffusion_model = Other(dm)`": Way(
        lambda s: in_place(s, lambda: setattr(s.model.model, "diffusion_model", Larger(s.transformer)))
    ),
    "`weight.data.mul_(x)`": Way(lambda s: in_place(s, lambda: s.layer.weight.data.mul_(MORE))),
    "`layer.weight = Parameter(...)`": Way(lambda s: in_place(s, lambda: _replace(s))),
    "`model.half()`": Way(lambda s: in_place(s, s.model.model.half), draws="none"),
    "`dm.compile()`": Way(lambda s: in_place(s, s.transformer.compile), draws="none"),
    "`Flux.forward_orig = f`, of the class": Way(
        lambda s: of_class(s, type(s.transformer), CORE[s.family])
    ),
    "`DoubleStreamBlock.forward = f`, of a block's class": Way(
        lambda s: of_class(s, type(s.block), "forward")
    ),
    "`Linear.forward = f`, of ComfyUI's layers": Way(
        lambda s: of_class(s, sys.modules["comfy.ops"].disable_weight_init.Linear, "forward")
    ),
    "`comfy.ldm.flux.math.optimized_attention = f`, of a file": Way(
        lambda s: over(s, sys.modules[ATTENTION[s.family]], "optimized_attention")
    ),
    "`torch.nn.functional.silu = f`": Way(lambda s: over(s, torch.nn.functional, "silu")),
    "a wrapper that puts a function over `forward_orig`, `forward_core_with_concat` for a call": Way(
        lambda s: for_a_call(s, s.transformer, CORE[s.family], more(getattr(s.transformer, CORE[s.family])))
    ),
    "a wrapper that takes blocks out of the list for a call": Way(
        lambda s: for_a_call(
            s, s.transformer, BLOCKS[s.family],
            torch.nn.ModuleList(list(getattr(s.transformer, BLOCKS[s.family]))[1:]),
        )
    ),
    "a wrapper that puts a function over the block's class for a call": Way(
        lambda s: for_a_call(s, type(s.block), "forward", method(type(s.block).forward))
    ),
    "`add_object_patch(\"diffusion_model.final_layer\", ...)`": Way(
        lambda s: cloned(
            s,
            lambda m: m.add_object_patch("diffusion_model.final_layer", Larger(s.transformer.final_layer)),
        )
    ),
    "`set_model_patch_replace(f, \"dit\", \"double_block\", 0)`": Way(
        lambda s: cloned(s, lambda m: m.set_model_patch_replace(_block, "dit", "double_block", 0))
    ),
    "`transformer_options[\"optimized_attention_override\"]`": Way(
        lambda s: cloned(
            s,
            lambda m: m.model_options["transformer_options"].update(optimized_attention_override=_attention),
        )
    ),
    "TorchCompileModel": Way(lambda s: by_node(s, "TorchCompileModel", backend="inductor"), draws="none"),
    "ModelComputeDtype": Way(lambda s: by_node(s, "ModelComputeDtype", dtype="bf16")),
    "ModelSamplingSD3, ModelSamplingFlux": Way(
        lambda s: by_node(s, SAMPLING[s.family][0], **SAMPLING[s.family][1]), refused=False
    ),
    "`set_model_unet_function_wrapper(f)`": Way(
        lambda s: cloned(s, lambda m: m.set_model_unet_function_wrapper(_around)), refused=False
    ),
    "`set_model_sampler_post_cfg_function(f)`": Way(
        lambda s: cloned(
            s, lambda m: m.set_model_sampler_post_cfg_function(lambda args: args["denoised"] * MORE)
        ),
        refused=False,
    ),
    "`add_wrapper(\"diffusion_model\", f)`, around the transformer": Way(
        lambda s: cloned(s, lambda m: m.add_wrapper("diffusion_model", _wrapped)), refused=False, draws="any"
    ),
    "`add_wrapper(\"apply_model\", f)`": Way(
        lambda s: cloned(s, lambda m: m.add_wrapper("apply_model", _wrapped)), refused=False
    ),
    "`add_patches({weight: (\"diff\", ...)}, 1.0)`": Way(
        lambda s: cloned(s, lambda m: m.add_patches(_diff(s), 1.0)), refused=False
    ),
    "`BaseModel.apply_model = f`, of the class around it": Way(
        lambda s: of_class(s, sys.modules["comfy.model_base"].BaseModel, "_apply_model"), refused=False
    ),
    "`dm.notes_of_a_pack = {}`": Way(
        lambda s: in_place(s, lambda: setattr(s.transformer, "notes_of_a_pack", {})),
        refused=False, draws="same",
    ),
}  # fmt: skip
