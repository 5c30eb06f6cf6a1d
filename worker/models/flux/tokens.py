"""Latents to Flux's tokens and back, and the positions of reference latents (FLUX.1 Kontext).

Positions as ComfyUI gives them: (index, row, column). The picture has index 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from comfy_xdit.protocol.errors import InvalidInput
from worker.models.base import PATCH, packed, to_whole_patches

METHODS = ("offset", "index", "uxo")


def token_ids(
    shape: Sequence[int],
    device: torch.device,
    rope: Mapping[str, float],
    index: float = 0.0,
    down: int = 0,
    right: int = 0,
) -> torch.Tensor:
    """Positions (tokens, 3) of a latent of `shape`, moved down and right by so many latent pixels.

    `rope`, of ComfyUI's ScaleROPE node, has scale_x, scale_y (factors) and shift_x, shift_y, shift_t
    (tokens), each if it is set; it is empty where positions are as they are.
    """
    rows, columns = (-(-size // PATCH) for size in shape[-2:])
    first_row, first_column = -(-down // PATCH), -(-right // PATCH)
    if not rope:
        return _grid(
            index,
            torch.arange(rows, device=device) + first_row,
            torch.arange(columns, device=device) + first_column,
        )

    def along(axis: str, first: float, steps: int) -> torch.Tensor:
        first += rope.get(f"shift_{axis}", 0.0)
        last = first + (steps - 1.0) * rope.get(f"scale_{axis}", 1.0)
        return torch.linspace(first, last, steps, device=device)

    return _grid(
        index + rope.get("shift_t", 0.0), along("y", first_row, rows), along("x", first_column, columns)
    )


def _grid(index: float, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    ids = torch.zeros(len(rows), len(columns), 3, device=rows.device)
    ids[..., 0], ids[..., 1], ids[..., 2] = index, rows[:, None], columns[None, :]
    return ids.reshape(-1, 3)


def reference_tokens(
    latents: Sequence[torch.Tensor], method: str, x: torch.Tensor, rope: Mapping[str, float]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Tokens and positions of reference latents, which follow those of the picture `x`.

    `rope` moves them where its `references` says so: versions of ComfyUI differ.

    Raises:
        InvalidInput: a method of another version, or a latent that is none of this model.
    """
    if latents and method not in METHODS:
        raise InvalidInput(
            f"reference latents by the method {method!r} are not in this version; use one of "
            f"{', '.join(METHODS)}, or the stock loader instead of the xDiT one."
        )
    for latent, (index, down, right) in zip(latents, _places(latents, method, x), strict=True):
        if latent.ndim != 4 or latent.shape[:2] != x.shape[:2]:
            raise InvalidInput(
                f"a reference latent has shape {tuple(latent.shape)}, the picture's is {tuple(x.shape)}: "
                "batch and channels must be the same; encode the reference with the VAE of this model."
            )
        tokens = packed(to_whole_patches(latent.to(x.dtype), (PATCH, PATCH)))
        moved = rope if rope.get("references") else {}
        yield tokens, token_ids(latent.shape, x.device, moved, index, down, right)


def _places(latents: Sequence[torch.Tensor], method: str, x: torch.Tensor) -> Iterator[tuple[int, int, int]]:
    """Index, and how far down and right in latent pixels, of each reference."""
    height = width = 0  # of the references so far
    for number, latent in enumerate(latents, 1):
        rows, columns = latent.shape[-2:]
        if method == "index":
            yield number, 0, 0
        elif method == "uxo":  # each below and right of all before it
            yield 0, x.shape[-2] + height, x.shape[-1] + width
            height, width = height + rows, width + columns
        else:  # beside or below those before it, where the whole stays closer to a square
            beside = rows + height > columns + width
            down, right = (0, width) if beside else (height, 0)
            yield 1, down, right
            height, width = max(height, rows + down), max(width, columns + right)
