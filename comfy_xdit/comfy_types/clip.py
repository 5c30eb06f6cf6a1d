"""CLIP: the stock class over text encoders that are in the ranks."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import comfy.hooks
import comfy.model_management
import comfy.sd
import torch

from comfy_xdit.comfy_types.interruption import interrupted, interruptible
from comfy_xdit.comfy_types.model.detection import read_header
from comfy_xdit.comfy_types.model.patcher import HANDLE, RemotePatcher
from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.remote import RemoteTextEncoders, parse_weights, refuse_embeddings

Prompts = dict[str, list[list[tuple[str, float]]]]
ASKED_FOR = ("l", "g", "t5xxl")  # by stock nodes, whether the model has such an encoder or not
WEIGHTS = {"l": "clip_l", "g": "clip_g"}  # what ComfyUI calls an encoder's weights, where it is not its name


def clip_of(remote: RemoteTextEncoders) -> comfy.sd.CLIP:
    """A CLIP for every stock text node, whose encoders are `remote`.

    Stock and not a subclass: ComfyUI clones a CLIP into the stock class, so everything of ours is
    in the parts that a clone keeps.
    """
    management = comfy.model_management
    encoders = TextEncoders(remote)
    clip = comfy.sd.CLIP(no_init=True)
    clip.cond_stage_model = encoders
    clip.tokenizer = PromptReader(remote.info["encoders"])
    clip.patcher = RemotePatcher(
        encoders, management.text_encoder_device(), management.text_encoder_offload_device()
    )
    clip.patcher.hook_mode = comfy.hooks.EnumHookMode.MinVram
    clip.patcher.is_clip = True
    clip.apply_hooks_to_conds = None
    clip.layer_idx = None
    clip.use_clip_schedule = False
    clip.tokenizer_options = {}
    return clip


class PromptReader:
    """Stands where a tokenizer stands: reads prompt weights; the tokens are made in the ranks."""

    def __init__(self, encoders: Iterable[str]):
        self._names = tuple(dict.fromkeys((*encoders, *ASKED_FOR)))

    def tokenize_with_weights(
        self, text: str, return_word_ids: bool = False, tokenizer_options: Any = None, **more: Any
    ) -> dict[str, list[list[tuple[Any, ...]]]]:
        """Per encoder one chunk of (text, weight), or (text, weight, piece number).

        Raises:
            InvalidInput: the prompt or the options ask for what the ranks cannot do.
        """
        if tokenizer_options:
            raise InvalidInput(
                f"tokenizer options ({', '.join(tokenizer_options)}) are not in this version of comfy_xdit; "
                "remove the node that sets them."
            )
        if given := [name for name, value in more.items() if value is not None]:
            raise InvalidInput(
                f"a prompt with {', '.join(given)} is not in this version of comfy_xdit; encode it with "
                "'CLIP Text Encode (Prompt)', or with a stock CLIP loader."
            )
        refuse_embeddings(text)
        pieces = parse_weights(text)
        if return_word_ids:
            pieces = [(*piece, number) for number, piece in enumerate(pieces, 1)]
        return {name: [list(pieces)] for name in self._names}

    def state_dict(self) -> NoReturn:
        """Refused: the tokenizers are in the ranks."""
        _refuse_saving()


class TextEncoders(torch.nn.Module):
    """Stands where the text encoder model stands."""

    def __init__(self, remote: RemoteTextEncoders):
        super().__init__()
        setattr(self, HANDLE, remote)

    def reset_clip_options(self) -> None:
        """No option is ever set."""

    def set_clip_options(self, options: dict[str, Any]) -> None:
        """Take the options a stock CLIP sets.

        Raises:
            InvalidInput: one of them changes what is encoded.
        """
        if options.get("layer") is not None:
            raise InvalidInput(
                f"CLIPSetLastLayer (layer {options['layer']}) is not in this version; remove it."
            )
        if options.get("projected_pooled") is False:
            raise InvalidInput(
                "an unprojected pooled output is not in this version of comfy_xdit; use the stock loader's "
                "CLIP with this node."
            )

    def encode_token_weights(
        self, tokens: Prompts
    ) -> tuple[torch.Tensor, torch.Tensor | None, dict[str, torch.Tensor]]:
        """What PromptReader made, to context (1, T, D), pooled (1, P) and a CONDITIONING's other entries."""
        remote = getattr(self, HANDLE)
        prompts = {
            name: [[(piece[0], piece[1]) for piece in chunk] for chunk in tokens[name]]
            for name in remote.info["encoders"]
            if name in tokens
        }
        with interruptible():
            context, pooled, options = remote.encode(prompts, interrupted=interrupted)
        device = comfy.model_management.intermediate_device()
        options = {name: tensor.to(device) for name, tensor in options.items()}
        return context.to(device), None if pooled is None else pooled.to(device), options

    def state_dict(self, *_: Any, **__: Any) -> dict[str, torch.Tensor]:
        """Meta tensors under ComfyUI's names, so that a LoRA attaches and is refused, not lost."""
        remote = getattr(self, HANDLE)
        root = Path(remote.spec.path)
        return {
            _weight_name(name, key): tensor
            for name, folder in remote.info["encoders"].items()
            for file in sorted((root / folder).glob("*.safetensors"))
            for key, tensor in read_header(file).items()
        }

    def memory_estimation_function(self, *_: Any, **__: Any) -> int:
        """Bytes that encoding needs on the host."""
        return 0

    def load_sd(self, *_: Any, **__: Any) -> NoReturn:
        """Refused: the weights are in the ranks."""
        _refuse_saving()


def _weight_name(encoder: str, key: str) -> str:
    """ComfyUI's name of a tensor in a folder. transformers 5 writes a CLIP without its first word."""
    lacks = encoder in WEIGHTS and not key.startswith(("text_model.", "text_projection."))
    return f"{WEIGHTS.get(encoder, encoder)}.transformer.{'text_model.' if lacks else ''}{key}"


def _refuse_saving() -> NoReturn:
    raise InvalidInput(
        "the text encoders of an xDiT CLIP are in the ranks, so it cannot be saved or merged; "
        "load it with a stock loader node for that."
    )
