"""One family for every class of diffusers' that a folder brings and a row of a table describes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from comfy_xdit.protocol.description import LatentSpace, PromptPart
from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.sampling import Sampling
from worker.checkpoints import Shapes, Source, read_json
from worker.models.base import Call, ModelFamily
from worker.models.folders.latents import latent_space
from worker.models.folders.schedule import sampling_of
from worker.models.folders.words import checked, class_name, words_of
from worker.models.plans.diffusers import PLANS

Config = Mapping[str, Any]
# Further arguments of the class, by its configuration, the latent and the conditions.
More = Callable[[Config, torch.Tensor, Mapping[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class Argument:
    """An argument of the class that a conditioning gives.

    Args:
        condition: what ComfyUI's call names it.
        width: the entry of the configuration that its last dimension must be; "" may be any.
        option: the entry of a CONDITIONING that has it; "" is its first tensor.
        mask: the condition of whose tokens it says which count; all do where it is not given.
        optional: the class does without.
        default, factor: a number where the conditioning has none, and what it is multiplied by.
        remedy: where it comes from, in words.
    """

    condition: str
    width: str = ""
    option: str = ""
    mask: str = ""
    optional: bool = False
    default: float | None = None
    factor: float = 1.0
    remedy: str = "encode the prompt with the CLIP of its folder"


@dataclass(frozen=True)
class FolderClass:
    """One class of diffusers', as its pipelines call it.

    Args:
        name: what messages call the family.
        arguments: those of the class that come from the conditioning.
        more: further ones.
        taken: conditions that ComfyUI's own twin sends along and that say nothing new.
        needs: raises InvalidInput for folders of a variant that is called otherwise.
        video: its latents are (B, C, T, H, W).
        frames_first: the class takes them as (B, T, C, H, W).
        backwards: it counts time from noise to picture, and predicts the way there.
        guided: by a negative prompt; False where guidance is distilled into the model.
        text_tokens, products: as of ModelFamily.
        comfyui: what ComfyUI would tell the model by (its unet_config); empty where our own twin is better.
    """

    name: str
    arguments: Mapping[str, Argument]
    more: More = lambda config, x, conditions: {}
    taken: tuple[str, ...] = ()
    needs: Callable[[Config, Config], None] = lambda config, index: None
    video: bool = False
    frames_first: bool = False
    backwards: bool = False
    guided: bool = True
    text_tokens: int = 512
    products: float = 12.0
    comfyui: Callable[[Config], dict[str, Any]] = field(default=lambda config: {})


class FolderFamily(ModelFamily):
    """The transformer of one pipeline's folder. Its scheduler and VAE say how it samples, and what.

    Args:
        folder: of the transformer.
        row: of its class.
        shapes: of its tensors.

    Raises:
        InvalidInput: a part of the pipeline's folder is missing or damaged, or it is a variant that is called
            otherwise.
        KeyError, TypeError, ValueError, ArithmeticError: its files hold something else than numbers.
    """

    native = ""
    configurations: frozenset[str] = frozenset()  # single files run in ComfyUI's own classes
    control: ClassVar = {}

    def __init__(self, folder: Path, row: FolderClass, shapes: Shapes):
        self._row, self._file, self._names = row, folder / "config.json", tuple(shapes)
        self._class = class_name(folder)
        self.name, self.plan = row.name, PLANS[self._class]
        self.text_tokens, self.products, self.guided = row.text_tokens, row.products, row.guided
        self.conditions = frozenset({a.condition for a in row.arguments.values()} | set(row.taken))
        self._config = checked(words_of(self._file), self._file)
        row.needs(self._config, read_json(folder.parent / "model_index.json"))
        scheduler = folder.parent / "scheduler" / "scheduler_config.json"
        self._sampling = sampling_of(words_of(scheduler), scheduler)
        vae = folder.parent / "vae" / "config.json"
        latents = words_of(vae)
        self._latent = latent_space(latents, _patch(self._config, row.video, self._file), vae)
        self._inverted = bool(latents.get("invert_scale_latents"))
        _ = self.width(self._config) + self.beside(self._config)  # numbers, or a TypeError

    def detect(self, shapes: Shapes) -> bool:
        return True  # by the folder's own word

    def config(self, shapes: Shapes) -> dict[str, Any]:
        return dict(self._config)

    def build(self, config: dict[str, Any]) -> nn.Module:
        import diffusers

        return getattr(diffusers, self._class)(**config)

    def native_mapping(self, config: dict[str, Any]) -> dict[str, Source]:
        return {name: Source(name) for name in self._names}

    def sampling(self, config: dict[str, Any]) -> Sampling:
        return self._sampling

    def latent(self, config: dict[str, Any]) -> LatentSpace:
        return self._latent

    def beside(self, config: dict[str, Any]) -> int:
        return config["in_channels"] - self._latent.channels

    def twin(self, config: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
        return tuple(self._row.comfyui(config).items())

    def prompt(self, config: dict[str, Any]) -> tuple[PromptPart, ...]:
        return tuple(
            PromptPart(one.condition, one.option, one.default, one.optional or bool(one.mask))
            for one in self._row.arguments.values()
            if not one.width or config.get(one.width)
        )

    def call(
        self, config: dict[str, Any], x: torch.Tensor, timestep: torch.Tensor, conditions: dict[str, Any]
    ) -> Call:
        row, tokens = self._row, self._latent.tokens(x.shape)
        x = self._beginning(x)
        time = self._sampling.multiplier - timestep if row.backwards else timestep
        kwargs: dict[str, Any] = {
            "hidden_states": x.transpose(1, 2) if row.frames_first else x,
            "timestep": time * config.get("timestep_scale", 1.0),
        }
        for name, argument in row.arguments.items():
            value = self._value(argument, config, conditions, x)
            if value is not None:
                kwargs[name] = value
        kwargs |= row.more(config, x, conditions)
        return Call(kwargs, tokens)

    def output(self, config: dict[str, Any], sample: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        if self._row.frames_first:
            sample = sample.transpose(1, 2)
        sample = sample[:, : self._latent.channels]  # behind it a variance that no sampler here reads
        return -sample if self._row.backwards else sample

    def _beginning(self, x: torch.Tensor) -> torch.Tensor:
        """A latent whose picture beside it is scaled as the model was trained: some have it inversely."""
        if not self._inverted or x.shape[1] == self._latent.channels:
            return x
        return torch.cat(
            [x[:, : self._latent.channels], x[:, self._latent.channels :] / self._latent.scale**2], 1
        )

    def _value(
        self, argument: Argument, config: Config, conditions: dict[str, Any], x: torch.Tensor
    ) -> torch.Tensor | None:
        value = conditions.get(argument.condition)
        if argument.width and not config.get(argument.width):
            return None  # a variant of the class without it
        if argument.default is not None:
            value = torch.as_tensor(argument.default if value is None else value, device=x.device)
            return value.to(x.dtype).expand(x.shape[0]) * argument.factor
        if argument.mask:
            if value is not None:
                return value != 0
            return None if argument.optional else _all_tokens(conditions[argument.mask])
        if value is None and argument.optional:
            return None
        if not argument.width:
            return self._given(argument, value)
        return self.tensor(conditions, argument.condition, config[argument.width]).to(x.dtype)

    def _given(self, argument: Argument, value: Any) -> Any:
        if value is None:
            raise InvalidInput(
                f"the conditioning has no {argument.condition}, which {self.name} needs; {argument.remedy}."
            )
        return value


def _all_tokens(prompt: torch.Tensor) -> torch.Tensor:
    return torch.ones(prompt.shape[:2], dtype=torch.bool, device=prompt.device)


def _patch(config: Config, video: bool, file: Path) -> tuple[int, ...]:
    """Elements of a token along each dimension of a latent."""
    patch, time = config["patch_size"], config.get("patch_size_t") or 1
    if not isinstance(patch, (list, tuple)):
        patch = (time, patch, patch) if video else (patch, patch)
    if len(patch) != 2 + video or not all(isinstance(part, int) and part > 0 for part in patch):
        raise InvalidInput(
            f"{file} says patch_size {config['patch_size']}, and no such model has that; it is damaged: "
            "download it again."
        )
    return tuple(patch)
