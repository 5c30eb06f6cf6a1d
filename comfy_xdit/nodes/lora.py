"""XDiTLoraLoader: a MODEL that names a LoRA file for the ranks, and words for what it changes.

The file is checked when the node runs. From then on the MODEL names the file (path, size, time) and a
strength; the ranks compare that with what they have and read what they need.
"""

from __future__ import annotations

import logging
from typing import Any

from comfy_xdit.nodes.surroundings import Surroundings, check_name, surroundings
from comfy_xdit.protocol.spec import LoraFile

SHOWN = 5  # names of tensors that match nothing
_log = logging.getLogger(__name__)


class XDiTLoraLoader:
    """A MODEL with a LoRA that the ranks read from its file."""

    TITLE = "xDiT Lora Loader"
    DESCRIPTION = (
        "Adds a LoRA to an xDiT MODEL; the ranks read the file. Drop-in for LoraLoaderModelOnly, which "
        "works with an xDiT MODEL as well."
    )
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Widgets in LoraLoaderModelOnly's order."""
        strength = {"default": 1.0, "min": -100.0, "max": 100.0, "step": 0.01, "round": 0.001}
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "From an xDiT loader, or another LoRA node after it."}),
                "lora_name": (surroundings().names("loras"), {"tooltip": "Files in models/loras."}),
                "strength_model": ("FLOAT", strength | {"tooltip": "0: without it. Negative: its opposite."}),
            }
        }

    @classmethod
    def IS_CHANGED(cls, lora_name: str, **_: Any) -> tuple[int, int]:
        """Another file under the same name is another LoRA."""
        return LoraFile.of(surroundings().path("loras", lora_name)).stamp

    @classmethod
    def VALIDATE_INPUTS(cls, lora_name: str | None = None) -> bool | str:
        """Whether the file is one to choose, or why not."""
        return check_name("loras", lora_name)

    def load(self, model: Any, lora_name: str, strength_model: float) -> dict[str, Any]:
        """Have the ranks check the file; what it changes is shown on the node."""
        patched, text = add_lora(model, lora_name, strength_model, surroundings())
        return {"ui": {"text": [text]}, "result": (patched,)}


def add_lora(model: Any, lora_name: str, strength: float, here: Surroundings) -> tuple[Any, str]:
    """The MODEL with the LoRA at `strength`, and what to show on the node. `model` stays as it is.

    Raises:
        InvalidInput: `model` is a stock one, or the file is damaged or none for it.
    """
    remote = here.remote_of(model)
    if strength == 0:  # as stock: the file is not even read
        return model, f"{lora_name}: strength 0, nothing is changed."
    file = LoraFile.of(here.path("loras", lora_name))
    here.begin()
    with here.interruptible():
        told = remote.check_lora(file, interrupted=here.interrupted)
    text = words(file.name, told)
    if told["unmatched"]:
        _log.warning("comfy_xdit: %s", text)
    return here.with_lora(model, file, told["weights"], strength), text


def words(name: str, told: dict[str, Any]) -> str:
    """What the ranks said of a file (`CheckLora`), in words."""
    sentences = [f"{name} changes {_count(len(told['weights']), 'weight')}."]
    unmatched = told["unmatched"]
    if unmatched:
        more = f" and {len(unmatched) - SHOWN} more" if len(unmatched) > SHOWN else ""
        some = ", ".join(unmatched[:SHOWN]) + more
        sentences.append(f"Left out, since they match nothing: {_count(len(unmatched), 'tensor')} ({some}).")
    if told["text_encoders"]:
        sentences.append(f"Left out, for text encoders: {_count(told['text_encoders'], 'tensor')}.")
    return " ".join(sentences)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")
