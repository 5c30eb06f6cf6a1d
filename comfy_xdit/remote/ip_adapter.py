"""Pictures that prompt a MODEL through an IP-Adapter.

The MODEL names the adapter's file, which the ranks read, and carries the encoded picture, a weight and
the part of the run in which it counts. The negative prompt sees zeros instead of the picture.
docs/decisions/012-ip-adapter.md says why this is an addition to the MODEL.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.messages import ImagePrompt
from comfy_xdit.protocol.parallel import ParallelConfig
from comfy_xdit.protocol.spec import IPAdapterFile


@dataclass(frozen=True)
class PicturePrompt:
    """An encoded picture on a MODEL. `start` and `end` are shares of the run, as ComfyUI counts them."""

    file: IPAdapterFile
    embeds: torch.Tensor
    weight: float
    start: float = 0.0
    end: float = 1.0

    def at(self, sigma_of: Callable[[float], float]) -> ImagePrompt:
        """The same with noise levels, where `sigma_of` is the model's percent_to_sigma."""
        return ImagePrompt(
            self.file, self.embeds, self.weight, *(float(sigma_of(p)) for p in (self.start, self.end))
        )


def at_sigmas(
    prompts: Sequence[PicturePrompt], sigma_of: Callable[[float], float]
) -> tuple[ImagePrompt, ...]:
    """All of them with noise levels."""
    return tuple(prompt.at(sigma_of) for prompt in prompts)


def negative_rows(indices: Sequence[int] | None, rows: int) -> list[bool]:
    """Which rows of a call are of the negative prompt.

    Args:
        indices: ComfyUI's `cond_or_uncond`: 0 is the positive and 1 the negative prompt, each of them for
            an equal part of the rows.

    Raises:
        InvalidInput: they are not told, or a guider has further prompts, of which nobody says whether they
            see the picture.
    """
    if not indices or rows % len(indices):
        raise InvalidInput(
            f"a node calls the transformer with {rows} rows and does not say which of them are of the "
            f"negative prompt (cond_or_uncond is {indices}), which an IP-Adapter has to know. Remove that "
            "node, or 'xDiT IP-Adapter Apply'."
        )
    if any(index > 1 for index in indices):
        raise InvalidInput(
            f"the guider uses {max(indices) + 1} prompts, and an IP-Adapter knows a positive and a negative "
            "one only; use CFGGuider, BasicGuider or KSampler, or remove the 'xDiT IP-Adapter Apply' node."
        )
    return [index == 1 for index in indices for _ in range(rows // len(indices))]


def check_files(prompts: Sequence[ImagePrompt]) -> None:
    """Raise InvalidInput where a file has changed: asked here, before any rank has begun."""
    for file in {prompt.file for prompt in prompts}:
        file.check()


def refuse_stages(parallel: ParallelConfig) -> None:
    """Raise InvalidInput where the ranks hold the model in stages."""
    if parallel.pipefusion_degree > 1:
        raise InvalidInput(
            "an IP-Adapter adds to the attention over all image tokens of one step, and under PipeFusion "
            f"(pipefusion_degree {parallel.pipefusion_degree}) patches of several steps are on their way at "
            "once; set pipefusion_degree to 1, and ulysses_degree instead."
        )
