"""What of transformer_options travels to the ranks, what stays on the host, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import torch

from comfy_xdit.protocol.errors import InvalidInput

PICTURES = "xdit_pictures"  # in transformer_options: a tuple of PicturePrompt
# What the sampler, wrappers and step caches keep in transformer_options for themselves: it works
# around the transformer's call, on the host, where it is.
HOST_OPTIONS = {
    PICTURES,
    "callbacks",
    "cond_or_uncond",
    "context_window",
    "easycache",
    "lazycache",
    "multigpu_thread_device",
    "prefetch_dynamic_vbars",
    "sample_sigmas",
    "sigmas",
    "uuids",
    "wrappers",
}
# Of those, plain numbers that classes of ComfyUI's own read.
READ_BY_CLASSES = {"cond_or_uncond", "sample_sigmas", "sigmas"}
# What is plain numbers, and travels: a family in the ranks takes it as a condition, or refuses it.
RANK_OPTIONS = ("rope_options",)


def rank_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """What of transformer_options acts inside the transformer and travels to a diffusers class.

    Everything unknown is refused: what an entry does is its reader's business, and the readers
    are inside the transformer.

    Raises:
        InvalidInput: an entry that cannot reach the ranks.
    """
    travels = {}
    for name, value in options.items():
        if name in HOST_OPTIONS or not _says_something(value):
            continue
        if name in RANK_OPTIONS and all(isinstance(part, (int, float)) for part in value.values()):
            travels[name] = {key: float(part) for key, part in value.items()}
            continue
        _refuse(name, value)
    return travels


def plain_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """What travels to a class of ComfyUI's own, which reads what it reads: everything that is plain data.

    Raises:
        InvalidInput: an entry that is not, such as a function that patches the transformer.
    """
    travels = {}
    for name, value in options.items():
        if name in HOST_OPTIONS - READ_BY_CLASSES:
            continue
        if not _is_plain(value):
            _refuse(name, value)
        travels[name] = value
    return travels


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, (str, int)) and _is_plain(part) for key, part in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str, torch.Tensor))


def _says_something(value: Any) -> bool:
    return not (
        value is None or value is False or (isinstance(value, (Mapping, list, tuple)) and len(value) == 0)
    )


def _refuse(name: str, value: Any) -> NoReturn:
    inner = f" ({', '.join(map(str, value))})" if isinstance(value, Mapping) else ""
    raise InvalidInput(
        f"a node patches the inside of the transformer (transformer_options {name!r}{inner}), which "
        "cannot reach the ranks. Remove that node, or use the stock loader instead of the xDiT one."
    )
