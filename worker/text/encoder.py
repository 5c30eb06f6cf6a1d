"""One text encoder of a pipeline folder: transformers' class, as the folder names it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from comfy_xdit.protocol.errors import InvalidInput
from worker.checkpoints import Checkpoint, check_dtype, not_finite
from worker.text.layout import Layout, Part, Rows, joined, lay
from worker.text.pipelines import EncoderRule, Longer, Padding, Template
from worker.text.tokenizer import Tokenizer

WEIGHTS = (".weight", ".bias")  # other tensors may count positions


@dataclass(frozen=True)
class Encoded:
    """Hidden states (1, T, D), which tokens are no padding (1, T), and of a CLIP the pooled output (1, P)."""

    states: torch.Tensor
    mask: torch.Tensor
    pooled: torch.Tensor | None
    note: str = ""


class Encoder:
    """One tokenizer and its encoder.

    Args:
        root: the pipeline's folder.
        index: its model_index.json.

    Raises:
        InvalidInput: a part is missing or damaged, or of a class that the rule does not know.
    """

    def __init__(self, root: Path, index: dict[str, Any], rule: EncoderRule, device: torch.device):
        self._rule, self._device = rule, device
        self._folder, self._class = _part(root, index, f"text_encoder{rule.suffix}")
        self._tokenizer = Tokenizer(*_part(root, index, f"tokenizer{rule.suffix}"))
        if self._class not in rule.classes:
            raise InvalidInput(
                f"{root / 'model_index.json'} names {self._class!r} as {self._folder.name}, where this "
                f"version reads {' or '.join(rule.classes)}: download the folder again."
            )
        # Names a damaged or pickled file before transformers trips over it.
        self._checkpoint = Checkpoint.at(self._folder)
        for key in self._checkpoint.shapes:
            if key.endswith(WEIGHTS):
                check_dtype(self._checkpoint, key, str(self._folder))
        self._dtype = torch.float32 if device.type == "cpu" else self._checkpoint.common_dtype()
        self.nbytes = self._checkpoint.elements * self._dtype.itemsize
        self._blank = bool(rule.blank and index.get(rule.blank))

    @property
    def folder(self) -> str:
        """The name of its folder in the pipeline's."""
        return self._folder.name

    def load(self) -> None:
        """Read weights (as in the file on a GPU, as fp32 on CPU) and vocabulary."""
        self._module = self._read()
        self._module.config.use_cache = False  # nothing is written on
        self._module.to(self._device).eval().requires_grad_(False)
        self._tokenizer.load()
        self._template = None if self._rule.template is None else self._rule.template()

    def encode(self, parts: Sequence[Part]) -> Encoded:
        """Of texts and their weights: hidden states, mask and pooled output, as the pipeline has them."""
        is_empty = not any(text for text, _ in parts)
        template = self._template
        if is_empty and template is not None and not template.for_empty:
            template = None
        dropped = self._dropped(template)
        rows = self._laid(parts, template, dropped)
        states, mask, pooled = self._run(rows, blank=is_empty and self._blank)
        weights = torch.tensor([[weight for _, weight in row] for row in rows.rows], device=self._device)
        if (weights != 1.0).any():
            nothing = self._laid([("", 1.0)], template, dropped, least=weights.shape[1])
            empty, _, _ = self._run(nothing)
            weighted = (states - empty) * weights[..., None] + empty
            states = torch.where(weights[..., None] == 1.0, states, weighted)
        if not all(torch.isfinite(t).all() for t in (states, pooled) if t is not None):
            raise not_finite(self._checkpoint, self._checkpoint.shapes, self._dtype, str(self._folder))
        states, mask = self._without(states.flatten(0, 1)[None], mask.flatten()[None], dropped)
        return Encoded(states, mask, None if pooled is None else pooled[:1], self._note(rows))

    def _read(self) -> torch.nn.Module:
        """The encoder, if the file has all of it: transformers would fill the rest with random numbers."""
        import transformers

        cls = getattr(transformers, self._class)
        try:
            config = cls.config_class.from_pretrained(self._folder, local_files_only=True)
        except Exception as error:  # of many classes, some of them of other packages
            words = " ".join(str(error).split())
            raise InvalidInput(
                f"{self._folder / 'config.json'} is none of a {self._class} ({words}); download it again."
            ) from error
        module, told = cls.from_pretrained(
            self._folder, config=config, dtype=self._dtype, local_files_only=True,
            output_loading_info=True, ignore_mismatched_sizes=True,
        )  # fmt: skip
        # What a BERT pools is asked for by no pipeline here, and some files lack it.
        missing = sorted(key for key in told["missing_keys"] if not key.startswith("pooler."))
        missing += sorted(key for key, *_ in told["mismatched_keys"])
        if missing:
            raise InvalidInput(
                f"{self._folder} lacks {len(missing)} of the tensors of {self._class}, or has them in "
                f"another shape than its config.json says, {missing[0]} first; download it again."
            )
        return module

    def _without(
        self, states: torch.Tensor, mask: torch.Tensor, dropped: range
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """States and mask without the instruction's, and without padding where the pipeline has none."""
        kept = [place for place in range(states.shape[1]) if place not in dropped]
        if self._rule.padding is Padding.LEFT_OUT:
            kept = [place for place in kept if mask[0, place]]
        return states[:, kept], mask[:, kept]

    def _laid(self, parts: Sequence[Part], template: Template | None, dropped: range, least: int = 0) -> Rows:
        """The tokens of a prompt and of the instruction around it."""
        rule, tokenizer = self._rule, self._tokenizer
        length = (rule.length or self._module.config.max_position_embeddings) + len(dropped)
        most = 0 if rule.longer is Longer.AS_IT_IS else length
        layout = Layout(
            tokenizer.head, tokenizer.tail, tokenizer.pad, length, most, rule.longer is Longer.IN_ROWS
        )
        if rule.longer is Longer.LEFT_OUT:
            parts = self._cleaned(joined(parts))
        if template is not None:
            parts = joined([(template.before, 1.0), *parts, (template.after, 1.0)])
        groups = [[(token, weight) for token in tokenizer.tokens(text)] for text, weight in parts]
        return lay(groups, layout, least)

    def _cleaned(self, parts: list[Part]) -> list[Part]:
        """As the pipeline cleans a text, which takes the space around it away: not between two parts."""
        clean = self._rule.clean
        if clean is None:
            return parts
        return [(" " * (place > 0 and t[:1].isspace()) + clean(t), w) for place, (t, w) in enumerate(parts)]

    def _run(self, laid: Rows, blank: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Hidden states (rows, T, D), mask (rows, T) and pooled outputs (rows, P)."""
        rule = self._rule
        ids = torch.tensor([[token for token, _ in row] for row in laid.rows], device=self._device)
        mask = torch.zeros_like(ids)
        for row, filled in enumerate(laid.filled):
            mask[row, :filled] = 1
        if blank:
            ids, mask = torch.zeros_like(ids), torch.zeros_like(mask)
        masked = {"attention_mask": mask} if rule.masked else {}
        output = self._module(ids, output_hidden_states=rule.hidden is not None, **masked)
        states = output.last_hidden_state if rule.hidden is None else output.hidden_states[rule.hidden]
        if rule.padding is Padding.ZEROED:
            states = states * mask[..., None]
        if not rule.pooled:
            return states.float(), mask, None
        pooled = output.text_embeds if hasattr(output, "text_embeds") else output.pooler_output
        return states.float(), mask, pooled.float()

    def _dropped(self, template: Template | None) -> range:
        """Places of the instruction's hidden states that are left out."""
        if template is None:
            return range(0)
        count = template.dropped
        if count is None:
            count = (
                len(self._tokenizer.head) + len(self._tokenizer.tokens(template.before)) - template.start - 1
            )
        return range(template.start, template.start + count)

    def _note(self, rows: Rows) -> str:
        """A sentence if words of the prompt were left out."""
        words = self._tokenizer.words(rows.left_out)
        if not words:
            return ""
        return (
            f"the prompt has {len(rows.left_out)} tokens more than the {self._rule.length} that "
            f"{self.folder} takes; they were left out: {words!r}."
        )


def _part(root: Path, index: dict[str, Any], name: str) -> tuple[Path, str]:
    """A part's folder, and the class that the index names for it."""
    told = index.get(name)
    if not isinstance(told, list) or len(told) != 2 or told[0] != "transformers" or not told[1]:
        raise InvalidInput(
            f"{root / 'model_index.json'} names {told!r} as {name}, where a class of transformers is needed: "
            "download the complete folder."
        )
    if not (root / name).is_dir():
        raise InvalidInput(
            f"{root} lacks the folder {name} that its model_index.json names; download the complete folder."
        )
    return root / name, str(told[1])
