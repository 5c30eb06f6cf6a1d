"""Text encoders of a diffusers pipeline, with ComfyUI's rules: weights, chunks, padding, joining.

diffusers alone would cut a prompt at 77 tokens and know no weights; a stock CLIPTextEncode promises
both. The rules are those of ComfyUI's CLIP-L, CLIP-G and T5 for SD3 and FLUX.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.spec import ModelSpec
from worker.checkpoints import Checkpoint, check_dtype, not_finite, read_json

LONGEST_WHOLE_GROUP = 8  # a longer run of tokens may be cut at the end of a chunk
Token = tuple[int, float]
# pipeline class -> (encoder name, folder suffix) in ComfyUI's names
ENCODERS = {
    "StableDiffusion3Pipeline": (("l", ""), ("g", "_2"), ("t5xxl", "_3")),
    "FluxPipeline": (("l", ""), ("t5xxl", "_2")),
}
ARCHITECTURES = ("CLIPTextModelWithProjection", "CLIPTextModel", "T5EncoderModel")
WEIGHTS = (".weight", ".bias")  # other tensors may count positions
T5_LEAST = {"StableDiffusion3Pipeline": 77, "FluxPipeline": 256}


@dataclass(frozen=True)
class Chunked:
    """How an encoder's tokens become chunks: `longest` 0 means one chunk of any length."""

    start: int | None
    end: int
    pad: int
    longest: int
    least: int


class TextEncoders:
    """Every text encoder of one pipeline folder, in this rank."""

    def __init__(self, spec: ModelSpec, device: torch.device):
        root = Path(spec.path)
        index = read_json(root / "model_index.json")
        self._pipeline = index.get("_class_name", "")
        if self._pipeline not in ENCODERS:
            raise InvalidInput(f"{root} is a {self._pipeline}; this version reads {', '.join(ENCODERS)}.")
        self._encoders = {
            name: Encoder(root, suffix, name, T5_LEAST[self._pipeline], device)
            for name, suffix in ENCODERS[self._pipeline]
            if (index.get(f"text_encoder{suffix}") or [None])[0] is not None
        }
        config = read_json(root / "transformer" / "config.json")  # where the context's width stands
        self._width: int = config["joint_attention_dim"]
        self.nbytes = sum(encoder.nbytes for encoder in self._encoders.values())

    def load(self) -> None:
        """Read the weights."""
        for encoder in self._encoders.values():
            encoder.load()

    def describe(self) -> dict[str, Any]:
        """What the host needs to know."""
        return {"encoders": list(self._encoders), "pipeline": self._pipeline, "context_dim": self._width}

    def encode(self, prompts: dict[str, list[list[tuple[str, float]]]]) -> dict[str, torch.Tensor | None]:
        """Context (1, T, D) and pooled (1, P) for chunks of (text, weight) per encoder."""
        _check_prompts(prompts)
        outputs = {
            name: encoder.encode([part for chunk in prompts.get(name, [[("", 1.0)]]) for part in chunk])
            for name, encoder in self._encoders.items()
        }
        if self._pipeline == "FluxPipeline":
            return {"cond": outputs["t5xxl"][0], "pooled": outputs["l"][1]}
        return self._join_sd3(outputs)

    def _join_sd3(
        self, outputs: dict[str, tuple[torch.Tensor, torch.Tensor | None]]
    ) -> dict[str, torch.Tensor]:
        """CLIP-L beside CLIP-G, widened to the context, T5 behind."""
        clips = [outputs[name] for name in ("l", "g") if name in outputs]
        tokens = min(states.shape[1] for states, _ in clips)
        context = torch.cat([states[:, :tokens] for states, _ in clips], dim=-1)
        context = torch.nn.functional.pad(context, (0, self._width - context.shape[-1]))
        if "t5xxl" in outputs:
            context = torch.cat([context, outputs["t5xxl"][0]], dim=1)
        return {"cond": context, "pooled": torch.cat([pooled for _, pooled in clips], dim=-1)}


class Encoder:
    """One tokenizer and its encoder."""

    def __init__(self, root: Path, suffix: str, name: str, t5_least: int, device: torch.device):
        self._folder, self._tokenizer_folder = root / f"text_encoder{suffix}", root / f"tokenizer{suffix}"
        # Names a damaged or pickled file before transformers trips over it.
        self._checkpoint = Checkpoint.at(self._folder)
        for key in self._checkpoint.shapes:
            if key.endswith(WEIGHTS):
                check_dtype(self._checkpoint, key, str(self._folder))
        self._dtype = torch.float32 if device.type == "cpu" else self._checkpoint.common_dtype()
        self.nbytes = self._checkpoint.elements * self._dtype.itemsize
        self._architecture = _architecture(self._folder)
        self._device, self._is_t5, self._t5_least = device, name == "t5xxl", t5_least

    def load(self) -> None:
        """Read weights (as in the file on a GPU, as fp32 on CPU) and vocabulary."""
        import transformers

        cls = getattr(transformers, self._architecture)
        self._module = cls.from_pretrained(self._folder, dtype=self._dtype, local_files_only=True)
        self._module.to(self._device).eval().requires_grad_(False)
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(
            self._tokenizer_folder, local_files_only=True
        )
        self._rule = self._t5_rule(self._t5_least) if self._is_t5 else self._clip_rule()

    def encode(self, parts: list[tuple[str, float]]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Hidden states (1, T, D) and, of a CLIP, the first chunk's pooled output (1, P)."""
        groups = [[(token, weight) for token in self._tokens(text)] for text, weight in parts]
        chunks = chunk(groups, self._rule)
        states, pooled = self._run([[token for token, _ in c] for c in chunks])
        weights = torch.tensor([[weight for _, weight in c] for c in chunks], device=self._device)
        if (weights != 1.0).any():
            empty, _ = self._run([[token for token, _ in chunk([], self._rule, weights.shape[1])[0]]])
            states = (states - empty) * weights[..., None] + empty
        if not all(torch.isfinite(t).all() for t in (states, pooled) if t is not None):
            raise not_finite(self._checkpoint, self._checkpoint.shapes, self._dtype, str(self._folder))
        return states.flatten(0, 1)[None], None if pooled is None else pooled[:1]

    def _run(self, ids: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor | None]:
        output = self._module(torch.tensor(ids, device=self._device), output_hidden_states=not self._is_t5)
        if self._is_t5:
            return output.last_hidden_state.float(), None
        pooled = output.text_embeds if hasattr(output, "text_embeds") else output.pooler_output
        return output.hidden_states[-2].float(), pooled.float()

    def _tokens(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False, truncation=False).input_ids if text else []

    def _clip_rule(self) -> Chunked:
        t = self._tokenizer
        length = self._module.config.max_position_embeddings
        return Chunked(t.bos_token_id, t.eos_token_id, t.pad_token_id, length, length)

    def _t5_rule(self, least: int) -> Chunked:
        return Chunked(None, self._tokenizer.eos_token_id, self._tokenizer.pad_token_id, 0, least)


def _architecture(folder: Path) -> str:
    """The class of an encoder, as its config.json says."""
    told = read_json(folder / "config.json").get("architectures")
    if not isinstance(told, list) or not told or told[0] not in ARCHITECTURES:
        raise InvalidInput(
            f"{folder / 'config.json'} names {told!r} as the encoder's architectures; one of "
            f"{', '.join(ARCHITECTURES)} is read: download the folder again."
        )
    return told[0]


def chunk(groups: list[list[Token]], rule: Chunked, least: int = 0) -> list[list[Token]]:
    """Lay groups of tokens into chunks with start, end and padding.

    A group shorter than LONGEST_WHOLE_GROUP is not cut: it moves to the next chunk.
    """
    head = [] if rule.start is None else [(rule.start, 1.0)]
    room = rule.longest - len(head) - 1 if rule.longest else None
    bodies: list[list[Token]] = [[]]
    for group in groups:
        rest = list(group)
        while rest:
            free = len(rest) if room is None else room - len(bodies[-1])
            if len(rest) > free and len(group) < LONGEST_WHOLE_GROUP and bodies[-1]:
                free = 0
            bodies[-1] += rest[:free]
            rest = rest[free:]
            if rest:
                bodies.append([])
    length = max(rule.least, least)
    chunks = [[*head, *body, (rule.end, 1.0)] for body in bodies]
    return [c + [(rule.pad, 1.0)] * (length - len(c)) for c in chunks]


def _check_prompts(prompts: dict[str, Any]) -> None:
    for name, chunks in prompts.items():
        for part in (part for c in chunks for part in c):
            text, weight = part
            if not isinstance(text, str) or not isinstance(weight, (int, float)):
                raise InvalidInput(
                    f"the prompt for {name} is {type(text).__name__} with weight {weight!r}; give it as text."
                )
