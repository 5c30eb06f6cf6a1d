"""What else a class of ComfyUI's does, by its name: data beside its plan, for whoever calls it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Any

import torch


class Rows(Enum):
    """How the rows of a call relate."""

    APART = auto()  # each is what it is alone
    TOGETHER = auto()
    ONE_TIME = auto()  # apart, where all have the same largest timestep


@dataclass(frozen=True)
class Traits:
    """What holds for most classes, where nothing else is said.

    Args:
        video: entries of a configuration that, where one is set, make the rows of a call frames of a video.
        forget: its method that drops what it keeps from call to call, for the same weights and pictures; ""
            keeps nothing.
        pictures: the argument of such a class whose tensor it compares by identity with the last call's.
        around: methods with weights that ComfyUI calls around the forward, of classes that have them.
        keeping: methods that begin to keep keys of earlier frames, of classes that have them.
        remade: entries of arguments that are no plain data, as "argument.entry", which the class makes anew
            where they are left out.
        heads, width: what configurations call attention heads and numbers per token; the first that is there.
        text_tokens: a prompt's usual length.
        products: multiplications per token and block, in units of width squared.
    """

    rows: Rows = Rows.APART
    video: tuple[str, ...] = ()
    forget: str = ""
    pictures: str = ""
    around: tuple[str, ...] = ("preprocess_text_embeds",)
    keeping: tuple[str, ...] = ("init_kv_caches",)
    remade: tuple[str, ...] = ()
    heads: tuple[str, ...] = ("num_heads", "num_attention_heads", "n_heads")
    width: tuple[str, ...] = (
        "hidden_size", "dim", "inner_dim", "model_channels", "model_dim", "embed_dim", "hidden_dim",
    )  # fmt: skip
    text_tokens: int = 512
    products: float = 12.0

    def rows_apart(self, timestep: torch.Tensor | Sequence[torch.Tensor | None]) -> bool:
        """Whether each row of a call is what it is alone.

        Args:
            timestep: (B, ...), or one of each latent: of sound there may be none.
        """
        if self.rows is Rows.ONE_TIME:
            times = [timestep] if isinstance(timestep, torch.Tensor) else timestep
            times = [time for time in times if time is not None]
            largest = [time.flatten(1).amax(1) if time.ndim > 1 else time for time in times]
            return all(bool((row == row[0]).all()) for row in largest)
        return self.rows is Rows.APART


TRAITS: dict[str, Traits] = {
    # The first row hears the voices of all.
    "AceStepConditionGenerationModel": Traits(Rows.TOGETHER),
    # It keeps keys of its prompt, and what it saw in its pictures.
    "HiDreamO1Transformer": Traits(forget="clear_kv_cache", pictures="ref_pixel_values"),
    # They pair the rows of both prompts.
    "HunYuanDiTPlain": Traits(Rows.TOGETHER),
    "NaDiT": Traits(Rows.TOGETHER),
    # From 0.33 on it takes the largest timestep of all rows, for what video and sound hear of each other:
    # where rows have noise masks of their own, they are not what they are alone.
    "LTXAVModel": Traits(Rows.ONE_TIME),
    "MiniMaxH3Model": Traits(remade=("minimax_payload.layout",)),
    # It looks up which rows are of which prompt.
    "Trellis2": Traits(Rows.TOGETHER),
    "UNetModel": Traits(video=("use_temporal_resblock", "use_temporal_attention"), text_tokens=77),
}


def traits_of(name: str, config: Mapping[str, Any] | None = None) -> Traits:
    """Of a class of ComfyUI's, by its name, and where given by what the class is built with."""
    traits = TRAITS.get(name, Traits())
    is_video = any((config or {}).get(entry) for entry in traits.video)
    return replace(traits, rows=Rows.TOGETHER) if is_video else traits
