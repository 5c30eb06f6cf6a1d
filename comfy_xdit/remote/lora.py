"""XDiTLoraLoader: a MODEL that names a LoRA file for the ranks, and words for what it changes.

The file is checked when the node runs. From then on the MODEL names the file (path, size, time) and a
strength; the ranks compare that with what they have and read what they need.
"""

from __future__ import annotations

import logging
from types import ModuleType
from typing import Any

from comfy_xdit.protocol.errors import Interrupted
from comfy_xdit.protocol.spec import LoraFile

SHOWN = 5  # names of tensors that match nothing
_log = logging.getLogger(__name__)


def add_lora(model: Any, lora_name: str, strength: float, here: ModuleType) -> tuple[Any, str]:
    """The MODEL with the LoRA at `strength`, and what to show on the node. `model` stays as it is.

    Args:
        here: the surroundings, comfy_xdit.comfy_types or comfy_xdit.headless.surroundings.

    Raises:
        InvalidInput: `model` is a stock one, or the file is damaged or none for it.
    """
    remote = here.remote_of(model)
    if strength == 0:  # as stock: the file is not even read
        return model, f"{lora_name}: strength 0, nothing is changed."
    file = LoraFile.of(here.lora_path(lora_name))
    here.begin()
    try:
        told = remote.check_lora(file, interrupted=here.interrupted)
    except Interrupted:
        here.raise_if_interrupted()
        raise
    text = words(file.name, told)
    if told["unmatched"]:
        _log.warning("comfy_xdit: %s", text)
    return here.with_file(model, file, told["weights"], strength), text


def lora_stamp(lora_name: str, here: ModuleType) -> tuple[int, int]:
    """Size and modification time of the file."""
    return LoraFile.of(here.lora_path(lora_name)).stamp


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
