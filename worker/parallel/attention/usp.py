"""Attention between ranks: Ulysses, Ring or both over parts of any length, without padding.

Papers: DeepSpeed-Ulysses (arXiv:2309.14509), Ring Attention (arXiv:2310.01889), USP (arXiv:2405.07719).
docs/xfuser.md says why this is not xfuser's USP, which pads and asserts; groups and kernels are xfuser's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from worker.parallel.attention.blockwise import Blockwise, WithLogSumExp
from worker.parallel.mesh import Mesh, arrive
from worker.parallel.parts import Part, Shard

# (query, key, value, mask) with this rank's heads of its Ulysses group's tokens.
Local = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


class Keep(Protocol):
    """What stands between the exchange and the attention: PipeFusion's keys and values of other patches."""

    def renew(self, key: torch.Tensor, value: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What attention sees in place of the keys and values (B, heads, keys, width) of a block."""


class Order:
    """Where the tokens that a rank, or a block of the ring, has in this call are in the whole sequence.

    Args:
        parts: of the streams, in their order.
    """

    def __init__(self, parts: Sequence[Part], device: torch.device):
        wholes = torch.arange(sum(part.length for part in parts), device=device)
        pieces = wholes.split([part.length for part in parts])
        self._brought = [piece[part.first :] for piece, part in zip(pieces, parts, strict=True)]
        self._shards = [part.shard for part in parts]
        self._found: dict[range, torch.Tensor] = {}

    def of(self, ranks: range) -> torch.Tensor:
        """In the order in which they lie: rank after rank, and in each stream after stream."""
        if ranks not in self._found:
            spans = list(zip(self._brought, self._shards, strict=True))
            self._found[ranks] = torch.cat([t[shard.span(rank)] for rank in ranks for t, shard in spans])
        return self._found[ranks]


class USP:
    """One attention over the ranks of a mesh.

    Args:
        queries, keys: how many tokens every rank has.
        kernel: for the blocks of a ring, where nothing needs another.
    """

    def __init__(
        self,
        mesh: Mesh,
        queries: Sequence[int],
        keys: Sequence[int],
        kernel: WithLogSumExp | None = None,
        keep: Keep | None = None,
    ):
        self._mesh, self._queries, self._keys, self._kernel, self._keep = mesh, queries, keys, kernel, keep

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: Callable[[int, slice], torch.Tensor | None],
        scale: float | None,
        local: Local,
    ) -> torch.Tensor:
        """Attention of this rank's queries to all keys.

        Args:
            query, key, value: (B, heads, this rank's tokens, width).
            bias: of a block of the ring and a span of heads; (B or 1, heads or 1, queries or 1, keys).
            local: the attention where one rank sees all keys.

        Returns:
            (B, heads, this rank's queries, width).
        """
        mesh = self._mesh
        heads = Shard(query.shape[1], mesh.ulysses)
        own = heads.span(mesh.ulysses_rank)
        if mesh.ulysses > 1:
            query, key, value = self._heads_for_tokens(heads, query, key, value)
        if mesh.ring == 1:
            if self._keep is not None:
                key, value = self._keep.renew(key, value, 0)
            result = local(query, key, value, bias(0, own)) if query.numel() else query
        else:
            result = self._ring(query, key, value, lambda block: bias(block, own), scale)
        return self._tokens_for_heads(heads, result) if mesh.ulysses > 1 else result

    # ------------------------------------------------------------------ Ulysses

    def _heads_for_tokens(
        self, heads: Shard, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> list[torch.Tensor]:
        """From all heads of own tokens to own heads of all the group's tokens, in one all-to-all."""
        mesh = self._mesh
        block, own = mesh.block(mesh.ring_rank), heads.size(mesh.ulysses_rank)
        tensors = [(query, self._queries), (key, self._keys), (value, self._keys)]
        per_head = sum(t.shape[0] * t.shape[2] * t.shape[3] for t, _ in tensors)
        sent, at, sizes = query.new_empty(per_head * heads.length), 0, []
        for rank in range(mesh.ulysses):
            begin = at
            for tensor, _ in tensors:
                chunk = tensor[:, heads.span(rank)]
                sent[at : at + chunk.numel()].view(chunk.shape).copy_(chunk)
                at += chunk.numel()
            sizes.append(at - begin)
        shapes = [[(len(t), own, n[rank], t.shape[3]) for t, n in tensors] for rank in block]
        counts = [[torch.Size(shape).numel() for shape in of_rank] for of_rank in shapes]
        arrived = mesh.exchange(sent, sizes, [sum(of_rank) for of_rank in counts])
        pieces = arrived.split([count for of_rank in counts for count in of_rank])
        flat = [shape for of_rank in shapes for shape in of_rank]
        views = [piece.view(shape) for piece, shape in zip(pieces, flat, strict=True)]
        return [torch.cat(views[i :: len(tensors)], 2) for i in range(len(tensors))]

    def _tokens_for_heads(self, heads: Shard, result: torch.Tensor) -> torch.Tensor:
        """Back: from own heads of all the group's queries to all heads of own ones."""
        mesh = self._mesh
        tokens = [self._queries[rank] for rank in mesh.block(mesh.ring_rank)]
        batch, width = result.shape[0], result.shape[3]
        sent, at = result.new_empty(result.numel()), 0
        for chunk in result.split(tokens, 2):
            sent[at : at + chunk.numel()].view(chunk.shape).copy_(chunk)
            at += chunk.numel()
        one = batch * width
        own = tokens[mesh.ulysses_rank]
        coming = [one * own * size for size in heads.sizes]
        arrived = mesh.exchange(sent, [one * result.shape[1] * n for n in tokens], coming)
        views = [
            piece.view(batch, size, own, width)
            for piece, size in zip(arrived.split(coming), heads.sizes, strict=True)
        ]
        return torch.cat(views, 1)

    # ------------------------------------------------------------------ Ring

    def _ring(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: Callable[[int], torch.Tensor | None],
        scale: float | None,
    ) -> torch.Tensor:
        """The blocks of keys pass by one after another; the next one comes while one is attended to."""
        mesh, result = self._mesh, Blockwise(query, scale, self._kernel)
        block = torch.stack([key, value])
        for step in range(mesh.ring):
            source = (mesh.ring_rank - step) % mesh.ring
            arriving, works = block, []
            if step + 1 < mesh.ring:
                coming = sum(self._keys[rank] for rank in mesh.block((source - 1) % mesh.ring))
                arriving = block.new_empty(*block.shape[:3], coming, block.shape[4])
                works = mesh.pass_on(block, arriving)
            key, value = block
            if self._keep is not None:
                key, value = self._keep.renew(key, value, source)
            result.add(key, value, bias(source))
            arrive(works)
            block = arriving
        return result.result
