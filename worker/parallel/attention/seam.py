"""The seam: the one place where attention is caught while a planned module runs.

In a planned module a call of `scaled_dot_product_attention` (diffusers) or of ComfyUI's `optimized_attention`
becomes one attention over the ranks. Everywhere else they are what they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from worker.parallel.attention.blockwise import scaled_dot_product_attention
from worker.parallel.plan import INSTEAD, PlanMismatch


class Attending(Protocol):
    """What a planned module's attention becomes while the module runs.

    Args:
        causal: but for one that is causal, which stays what it was.
    """

    causal: bool

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float | None,
        local: Callable[..., torch.Tensor],
    ) -> torch.Tensor:
        """(B, heads, own tokens, width) each; `local` is the attention of one device."""


_attending: list[Attending | None] = []


def begin(attending: Attending) -> None:
    """From now on attention is `attending`'s."""
    _attending.append(attending)


def end() -> None:
    """What was before `begin`."""
    _attending.pop()


@contextmanager
def one_device() -> Iterator[None]:
    """Within, attention is what it was, also in a planned module: that of whole, or of own, tokens."""
    _attending.append(None)
    try:
        yield
    finally:
        _attending.pop()


def _torch_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """In place of torch.nn.functional.scaled_dot_product_attention."""
    attending = _attending[-1] if _attending else None
    if attending is None or (is_causal and attending.causal):
        return scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if is_causal or dropout_p:
        raise PlanMismatch(f"attention that is causal or drops out is not split over ranks; {INSTEAD}")
    if attn_mask is not None:  # (heads, queries, keys) or (queries, keys) too
        attn_mask = attn_mask[(None,) * (4 - attn_mask.ndim)]
    if enable_gqa and key.shape[1] != query.shape[1]:
        key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))

    def local(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return scaled_dot_product_attention(q, k, v, mask, scale=scale)

    return attending.attend(query, key, value, attn_mask, scale, local)


def catch_torch() -> None:
    """Have the seam in torch.nn.functional; once is enough."""
    F.scaled_dot_product_attention = _torch_attention


def catching(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """ComfyUI's `optimized_attention(q, k, v, heads, mask=None, ...)` with the seam in front.

    Tensors are (B, tokens, heads * width), or (B, heads, tokens, width) with `skip_reshape`.
    """

    def optimized_attention(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        heads: int,
        mask: Any = None,
        *args: Any,
        **options: Any,
    ) -> torch.Tensor:
        if not _attending or _attending[-1] is None:
            return original(q, k, v, heads, mask, *args, **options)
        q, k, v = (_content(t) for t in (q, k, v))
        if args:
            raise PlanMismatch(f"optimized_attention is called with {len(args)} more positional arguments")
        return _comfyui_attention(original, q, k, v, heads, mask, options)

    optimized_attention.original = original
    return optimized_attention


def _content(given: Any) -> torch.Tensor:
    """What some classes hand over in a container, so that the attention may free it."""
    return given if isinstance(given, torch.Tensor) else given.take()


def choosing(original: Callable[..., Any]) -> Callable[..., Any]:
    """ComfyUI's `optimized_attention_for_device`, with the seam in front of the attention it returns."""

    def optimized_attention_for_device(*args: Any, **options: Any) -> Any:
        attention = original(*args, **options)
        return attention if hasattr(attention, "original") else catching(attention)

    optimized_attention_for_device.original = original
    return optimized_attention_for_device


def _comfyui_attention(
    original: Callable[..., torch.Tensor],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    heads: int,
    mask: torch.Tensor | None,
    options: dict[str, Any],
) -> torch.Tensor:
    apart = options.pop("skip_reshape", False)
    whole = options.pop("skip_output_reshape", False)
    if not apart:
        q, k, v = (t.flatten(2).unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    if k.shape[1] != q.shape[1]:  # grouped queries
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    options.pop("enable_gqa", None)
    if mask is not None and mask.ndim < 4:  # as ComfyUI reads them: (queries, keys) or (B, queries, keys)
        mask = mask[None, None] if mask.ndim == 2 else mask[:, None]

    def local(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        with one_device():  # PyTorch's attention may be what ComfyUI chose
            return original(
                query, key, value, query.shape[1], mask,
                skip_reshape=True, skip_output_reshape=True, **options,
            )  # fmt: skip

    out = _attending[-1].attend(q, k, v, mask, options.get("scale"), local)
    return out if whole else out.transpose(1, 2).flatten(2)
