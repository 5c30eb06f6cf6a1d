"""Keys and values of all patches of a picture, kept between the exchange of ranks and the attention.

Source: PipeFusion, arXiv:2405.14430; docs/decisions/007-pipefusion.md says why they are kept here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from worker.parallel.mesh import Mesh
from worker.parallel.parts import Shard

Span = tuple[int, int]  # first token, and the one after the last


@dataclass(frozen=True)
class Patches:
    """How the tokens of a stream are cut. Other streams (text) come whole with the first patch.

    Args:
        spans: of the patches, in order; together the whole stream.
    """

    stream: str
    spans: tuple[Span, ...]

    @classmethod
    def of(cls, stream: str, length: int, count: int) -> Patches:
        """As even as they go."""
        shard = Shard(length, count)
        return cls(stream, tuple((shard.start(i), shard.start(i + 1)) for i in range(count)))

    def span(self, patch: int, stream: str, length: int) -> Span:
        """What of a stream of so many tokens comes with a patch."""
        if stream == self.stream:
            return self.spans[patch]
        return (0, length) if patch == 0 else (0, 0)


class KeptOrder:
    """The order in which the keys of a sequence of streams are kept.

    Block after block of the ring; in it patch after patch, as the exchange brings it. So what a patch
    renews, and what attention sees in place of a block, each lies in one piece.

    Args:
        lengths: of the streams, in their order.
    """

    def __init__(self, lengths: Mapping[str, int], patches: Patches, mesh: Mesh, device: torch.device):
        self.places: list[list[Span]] = []  # by block and patch
        found, at = [], 0
        for block in range(mesh.ring):
            self.places.append([])
            for patch in range(len(patches.spans)):
                ranks = mesh.block(block)
                tokens = [i for rank in ranks for i in _brought(lengths, patches, patch, mesh, rank)]
                self.places[-1].append((at, at + len(tokens)))
                found += tokens
                at += len(tokens)
        self.size = at
        self._true = torch.tensor(found, dtype=torch.long, device=device)
        self._kept = self._true.argsort()

    def block(self, block: int) -> Span:
        """Where the keys of a block of the ring are kept."""
        return self.places[block][0][0], self.places[block][-1][1]

    def true(self, block: int) -> torch.Tensor:
        """Where the keys kept of a block are in the sequence."""
        return self._true[slice(*self.block(block))]

    def kept(self, true: torch.Tensor) -> torch.Tensor:
        """Where keys of the sequence are kept."""
        return self._kept[true]


def _brought(lengths: Mapping[str, int], patches: Patches, patch: int, mesh: Mesh, rank: int) -> list[int]:
    """The tokens of a sequence that one rank has of a patch."""
    found, offset = [], 0
    for stream, length in lengths.items():
        start, stop = patches.span(patch, stream, length)
        span = Shard(stop - start, mesh.ranks).span(rank)
        found += range(offset + start + span.start, offset + start + span.stop)
        offset += length
    return found


@dataclass
class Kept:
    """What is kept of one attention; in the present call it renews this.

    Args:
        patch: that the call brings; None is all tokens.
        arriving: where the keys of a block of the ring are in the sequence, of a call with all tokens.
    """

    order: KeptOrder
    patch: int | None = None
    arriving: Callable[[int], torch.Tensor] | None = None
    keys: torch.Tensor | None = None  # (2, B, heads, all tokens, width): keys and values

    def renew(self, key: torch.Tensor, value: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What attention sees in place of the keys and values (B, heads, keys, width) of a block."""
        if self.patch is None:
            return self._all(key, value, block)
        start, stop = self.order.places[block][self.patch]
        seen = self.keys[:, :, :, slice(*self.order.block(block))]
        if start < stop:
            self.keys[0, :, :, start:stop], self.keys[1, :, :, start:stop] = key, value
        return seen[0], seen[1]

    def seen(self, block: int) -> torch.Tensor | None:
        """Where the keys that attention sees of a block are in the sequence; None where they arrive."""
        return None if self.patch is None else self.order.true(block)

    def _all(self, key: torch.Tensor, value: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
        batch, heads, _, width = key.shape
        shape = (2, batch, heads, self.order.size, width)
        if self.keys is None or self.keys.shape != shape:
            self.keys = key.new_empty(shape)
        places = self.order.kept(self.arriving(block))
        self.keys[0].index_copy_(2, places, key)
        self.keys[1].index_copy_(2, places, value)
        return key, value


class KeptKeys:
    """Of all attentions of a stage, as the last calls of each patch left them.

    Args:
        rows: number of the rows that the present call is of: other rows have other keys.
        patch: that it brings; None is all tokens.
        patches: None keeps nothing.
    """

    def __init__(self, mesh: Mesh):
        self._mesh = mesh
        self._kept: dict[tuple[int, object, int], Kept] = {}
        self._orders: dict[tuple[int, str], KeptOrder] = {}
        self.rows, self.patch, self.patches = 0, None, None

    def begin(self, rows: int, patch: int | None, patches: Patches | None) -> None:
        """What the next call brings."""
        self.rows, self.patch, self.patches = rows, patch, patches

    def clear(self) -> None:
        """Let go of everything."""
        self._kept.clear()
        self._orders.clear()
        self.patches = None

    def of(
        self,
        attention: object,
        call: int,
        lengths: Mapping[str, int],
        arriving: Callable[[int], torch.Tensor],
        device: torch.device,
    ) -> Kept | None:
        """What is kept of the n-th call of an attention to a sequence of streams; None keeps nothing."""
        if self.patches is None:
            return None
        streams = (self.rows, " ".join(lengths))
        if streams not in self._orders:
            self._orders[streams] = KeptOrder(lengths, self.patches, self._mesh, device)
        name = (self.rows, attention, call)
        if name not in self._kept:
            self._kept[name] = Kept(self._orders[streams])
        kept = self._kept[name]
        kept.patch, kept.arriving = self.patch, arriving
        return kept
