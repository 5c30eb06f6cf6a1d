"""What a LoRA, or one of its kin, makes of a weight: the numbers that ComfyUI computes.

Papers: LoRA arXiv:2106.09685, LoHa and LoKr (LyCORIS) arXiv:2309.14859, DoRA arXiv:2402.09353,
OFT arXiv:2306.07280, BOFT arXiv:2311.06243, GLoRA arXiv:2306.07967. Where ComfyUI departs from
them (OFT applies the strength twice), its numbers hold; a test compares each kind with it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.messages import Patch

Tensors = dict[str, torch.Tensor]
# A change, and what it is to be multiplied with besides the strength.
Change = tuple[torch.Tensor, float]


def patched(
    key: str, weight: torch.Tensor, patches: tuple[Patch, ...], tensors: Callable[[Patch], Tensors]
) -> torch.Tensor:
    """The weight with all patches in their order.

    Args:
        key: native name of the weight, for messages.
        weight: in its native layout and the dtype to compute in; it is written to.
        patches: what to do.
        tensors: the tensors of one patch, on the weight's device and in its dtype.

    Raises:
        InvalidInput: a patch of another model, whose shapes do not fit.
    """
    for patch in patches:
        part = weight if patch.offset is None else _slices(key, weight, patch)
        if patch.base != 1.0:
            part *= patch.base
        try:
            part.copy_(_one(part, patch, tensors(patch)))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # torch's only word for shapes that do not fit
            raise _misfit(key, part, patch, str(error)) from error
    return weight


def _one(weight: torch.Tensor, patch: Patch, tensors: Tensors) -> torch.Tensor:
    if patch.kind == "set":
        return tensors["value"].expand(weight.shape)
    if patch.strength == 0:
        return weight
    delta, scale = _KINDS[patch.kind](weight, patch, tensors)
    if delta.numel() != weight.numel():
        raise RuntimeError(f"the change has shape {tuple(delta.shape)}")
    delta = delta.reshape(weight.shape)
    if "dora_scale" in tensors:
        return _decomposed(weight, _order(patch, delta * scale), tensors["dora_scale"], patch.strength)
    return weight + _order(patch, delta * (patch.strength * scale))


def _order(patch: Patch, change: torch.Tensor) -> torch.Tensor:
    return torch.cat(change.chunk(2)[::-1]) if patch.swapped else change


def _decomposed(
    weight: torch.Tensor, change: torch.Tensor, magnitude: torch.Tensor, strength: float
) -> torch.Tensor:
    """DoRA: the changed direction at a learned length, per output or per input channel."""
    changed = weight + change
    axis = 0 if magnitude.shape[0] == weight.shape[0] else 1
    measured = weight if axis == 0 else changed  # as ComfyUI: of what the file was made for
    others = [d for d in range(weight.ndim) if d != axis]
    length = torch.linalg.vector_norm(measured, dim=others, keepdim=True)
    target = changed * (magnitude / (length + torch.finfo(weight.dtype).eps))
    return weight + strength * (target - weight)


# ---------------------------------------------------------------------- the kinds


def _diff(weight: torch.Tensor, patch: Patch, tensors: Tensors) -> Change:
    if tensors["value"].shape != weight.shape:
        raise RuntimeError(f"the change has shape {tuple(tensors['value'].shape)}")
    return tensors["value"], 1.0


def _lora(weight: torch.Tensor, patch: Patch, tensors: Tensors) -> Change:
    up, down = tensors["up"], tensors["down"]
    scale = _scale(patch, down.shape[0])
    if "mid" in tensors:
        down = torch.einsum("abhw,bi->aihw", tensors["mid"], down.flatten(1))
    return up.flatten(1) @ down.flatten(1), scale


def _loha(weight: torch.Tensor, patch: Patch, tensors: Tensors) -> Change:
    def factor(n: int) -> torch.Tensor:
        a, b = tensors[f"w{n}_a"], tensors[f"w{n}_b"]
        return _tucker(tensors[f"t{n}"], a, b) if f"t{n}" in tensors else a @ b

    return factor(1) * factor(2), _scale(patch, tensors["w1_b"].shape[0])


def _lokr(weight: torch.Tensor, patch: Patch, tensors: Tensors) -> Change:
    rank = None
    factors = []
    for n in (1, 2):
        if f"w{n}" in tensors:
            factors.append(tensors[f"w{n}"])
            continue
        a, b = tensors[f"w{n}_a"], tensors[f"w{n}_b"]
        rank = b.shape[0]
        factors.append(_tucker(tensors["t2"], a, b) if n == 2 and "t2" in tensors else a @ b)
    first, second = factors
    if second.ndim == 4:
        first = first[..., None, None]
    return torch.kron(first, second), 1.0 if rank is None else _scale(patch, rank)


def _glora(weight: torch.Tensor, patch: Patch, tensors: Tensors) -> Change:
    a1, a2, b1, b2 = (tensors[n].flatten(1) for n in ("a1", "a2", "b1", "b2"))
    old = b2.shape[1] == b1.shape[0] == a1.shape[0] == a2.shape[1]
    new = b2.shape[0] == b1.shape[1] == a1.shape[1] == a2.shape[0]
    square = a2.shape[0] == weight.shape[0] == weight.shape[1]
    if old and (square or not new):  # LyCORIS has changed the order of the factors once
        return b2 @ b1 + (weight.flatten(1) @ a2 @ a1), _scale(patch, a1.shape[0])
    if not new:
        raise RuntimeError(f"its factors {[tuple(t.shape) for t in (a1, a2, b1, b2)]} do not fit each other")
    inner = torch.einsum("oi...,ij,jk->ok...", weight, a1, a2)
    return inner + (b1 @ b2).reshape(weight.shape), _scale(patch, a2.shape[0])


def _oft(weight: torch.Tensor, patch: Patch, tensors: Tensors) -> Change:
    blocks = tensors["blocks"]
    count, size, _ = blocks.shape
    turn = (_rotation(blocks, patch.alpha) - _eye(blocks)) * patch.strength
    rows = weight.reshape(count, size, *weight.shape[1:])
    return torch.einsum("knm,kn...->km...", turn, rows), 1.0


def _boft(weight: torch.Tensor, patch: Patch, tensors: Tensors) -> Change:
    blocks = tensors["blocks"]
    size, half = blocks.shape[-1], blocks.shape[-1] // 2
    turned = weight
    for level, rotation in enumerate(_rotation(blocks, patch.alpha)):
        rotation = rotation * patch.strength + (1 - patch.strength) * _eye(blocks)
        stride = half * 2**level
        # The butterfly: rows that lie `stride` apart meet in one block.
        paired = turned.unflatten(0, (-1, 2, stride)).transpose(1, 2).flatten(0, 2)
        paired = torch.einsum("bij,bj...->bi...", rotation, paired.unflatten(0, (-1, size)))
        turned = paired.flatten(0, 1).unflatten(0, (-1, stride, 2)).transpose(1, 2).flatten(0, 2)
    if "rescale" in tensors:
        turned = turned * tensors["rescale"]
    return turned - weight, 1.0


def _rotation(blocks: torch.Tensor, limit: float | None) -> torch.Tensor:
    """Cayley's transform of the antisymmetric part, whose norm `limit` bounds if it is over 0."""
    q = blocks - blocks.transpose(-1, -2)
    norm = torch.linalg.vector_norm(q) + 1e-8
    if limit and norm > limit:
        q = q * (limit / norm)
    return (_eye(blocks) + q) @ torch.linalg.inv((_eye(blocks) - q).float()).to(blocks.dtype)


def _eye(blocks: torch.Tensor) -> torch.Tensor:
    return torch.eye(blocks.shape[-1], device=blocks.device, dtype=blocks.dtype)


def _tucker(core: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.einsum("ijkl,jr,ip->prkl", core, b, a)


def _scale(patch: Patch, rank: int) -> float:
    return 1.0 if patch.alpha is None else patch.alpha / rank


_KINDS: dict[str, Callable[[torch.Tensor, Patch, Tensors], Change]] = {
    "diff": _diff,
    "lora": _lora,
    "loha": _loha,
    "lokr": _lokr,
    "glora": _glora,
    "oft": _oft,
    "boft": _boft,
}


def _slices(key: str, weight: torch.Tensor, patch: Patch) -> torch.Tensor:
    dim, start, length = patch.offset
    if dim >= weight.ndim or start + length > weight.shape[dim]:
        raise _misfit(key, weight, patch, f"it is for {length} slices of dimension {dim} from {start} on")
    return weight.narrow(dim, start, length)


def _misfit(key: str, weight: torch.Tensor, patch: Patch, why: str) -> InvalidInput:
    return InvalidInput(
        f"a {patch.kind} patch does not fit {key} with shape {tuple(weight.shape)}: {why}; "
        "choose a LoRA file made for this model."
    )
