"""Text encoders of a diffusers pipeline: what they give, put together as a CONDITIONING.

diffusers alone would cut a prompt of SD3 or FLUX.1 at 77 tokens and know no weights; a stock CLIPTextEncode
promises both. The rules of these two are those of ComfyUI's CLIP-L, CLIP-G and T5.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.spec import ModelSpec
from worker.checkpoints import read_json
from worker.text.encoder import Encoded, Encoder
from worker.text.pipelines import CONTEXT, PIPELINES


class TextEncoders:
    """Every text encoder of one pipeline folder, in this rank."""

    def __init__(self, spec: ModelSpec, device: torch.device):
        self._root = Path(spec.path)
        index = read_json(self._root / "model_index.json")
        self._pipeline = index.get("_class_name", "")
        if self._pipeline not in PIPELINES:
            raise InvalidInput(
                f"{self._root} is a {self._pipeline}; this version reads {', '.join(PIPELINES)}. Encode "
                "prompts with a stock CLIP loader."
            )
        self._rules = {
            rule.name: rule
            for rule in PIPELINES[self._pipeline]
            if not rule.optional or (index.get(f"text_encoder{rule.suffix}") or [None])[0] is not None
        }
        self._encoders = {
            name: Encoder(self._root, index, rule, device) for name, rule in self._rules.items()
        }
        self.nbytes = sum(encoder.nbytes for encoder in self._encoders.values())

    def load(self) -> None:
        """Read the weights."""
        for encoder in self._encoders.values():
            encoder.load()

    def describe(self) -> dict[str, Any]:
        """What the host needs to know: ComfyUI's name of every encoder, and its folder."""
        return {"encoders": {name: encoder.folder for name, encoder in self._encoders.items()}}

    def encode(self, prompts: dict[str, list[list[tuple[str, float]]]]) -> dict[str, Any]:
        """A CONDITIONING for chunks of (text, weight) per encoder.

        Returns:
            {"cond": (1, T, D), "pooled": (1, P) or None, "options": tensors by ComfyUI's names, "notes":
            sentences}.

        Raises:
            InvalidInput: a prompt is no text, or the pipeline has no encoders.
        """
        if not self._encoders:
            raise InvalidInput(
                f"{self._root.name} is a {self._pipeline}, which has no text encoder: it draws one of the "
                "classes it was trained on, by its number; use 'xDiT Class Label' in place of a prompt."
            )
        _check_prompts(prompts)
        outputs = {
            name: encoder.encode([part for chunk in prompts.get(name, [[("", 1.0)]]) for part in chunk])
            for name, encoder in self._encoders.items()
        }
        pooled = [output.pooled for output in outputs.values() if output.pooled is not None]
        return {
            "cond": self._context(outputs),
            "pooled": torch.cat(pooled, dim=-1) if pooled else None,
            "options": self._options(outputs),
            "notes": [output.note for output in outputs.values() if output.note],
        }

    def _context(self, outputs: dict[str, Encoded]) -> torch.Tensor:
        """What belongs side by side, as wide as the transformer's context; behind it the others' tokens."""
        kinds: dict[bool, list[torch.Tensor]] = {True: [], False: []}
        for name, output in outputs.items():
            if self._rules[name].context == CONTEXT:
                kinds[self._rules[name].beside].append(output.states)
        side_by_side, behind = kinds[True], kinds[False]
        if side_by_side:
            tokens = min(states.shape[1] for states in side_by_side)
            first = torch.cat([states[:, :tokens] for states in side_by_side], dim=-1)
            config = read_json(self._root / "transformer" / "config.json")  # where the context's width stands
            missing = config["joint_attention_dim"] - first.shape[-1]
            behind.insert(0, torch.nn.functional.pad(first, (0, missing)))
        return torch.cat(behind, dim=1)

    def _options(self, outputs: dict[str, Encoded]) -> dict[str, torch.Tensor]:
        options = {}
        for name, output in outputs.items():
            rule = self._rules[name]
            if rule.context not in ("", CONTEXT):
                options[rule.context] = output.states
            if rule.mask:
                options[rule.mask] = output.mask
        return options


def _check_prompts(prompts: dict[str, Any]) -> None:
    for name, chunks in prompts.items():
        for part in (part for c in chunks for part in c):
            text, weight = part
            if not isinstance(text, str) or not isinstance(weight, (int, float)):
                raise InvalidInput(
                    f"the prompt for {name} is {type(text).__name__} with weight {weight!r}; give it as text."
                )
