"""Image patches and text on the ranks that share a sequence, and the keys and values kept of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import nn

from worker.parallel.groups import RankGroups
from worker.parallel.xfuser_compat import keys_selected


@dataclass(frozen=True)
class Shard:
    """`length` tokens spread over `ranks` as evenly as they go, each part padded to one size."""

    length: int
    ranks: int

    @property
    def size(self) -> int:
        """Tokens per rank, padding included."""
        return -(-self.length // self.ranks)

    def start(self, rank: int) -> int:
        """The first token of `rank`: the first ranks take one more where the length does not divide."""
        return rank * (self.length // self.ranks) + min(rank, self.length % self.ranks)

    def valid(self, rank: int) -> int:
        """True tokens in the part of `rank`; the padding is behind them."""
        return self.start(rank + 1) - self.start(rank)

    def span(self, rank: int) -> slice:
        """Where the true tokens of `rank` are."""
        return slice(self.start(rank), self.start(rank + 1))

    def take(self, tokens: torch.Tensor, rank: int, dim: int = 1) -> torch.Tensor:
        """The part of `rank`, zero-padded to `size`."""
        count = self.valid(rank)
        part = tokens.narrow(dim, self.start(rank), count)
        if count == self.size:
            return part.contiguous()
        shape = list(part.shape)
        shape[dim] = self.size - count
        return torch.cat([part, part.new_zeros(shape)], dim)

    def own(self, tokens: torch.Tensor, rank: int) -> torch.Tensor:
        """What the part of `rank` has of (B, n, D), n at most `length`; no padding, and maybe nothing."""
        return tokens[:, self.span(rank)]


def positions(shards: Sequence[Shard], wanted: int, ranks: range) -> list[int]:
    """Where the true tokens of one of `shards` are when the parts of `ranks` lie one behind another."""
    width, offset = sum(shard.size for shard in shards), sum(shard.size for shard in shards[:wanted])
    return [i * width + offset + j for i, r in enumerate(ranks) for j in range(shards[wanted].valid(r))]


def true_positions(shards: Sequence[Shard], ranks: range, device: torch.device) -> torch.Tensor:
    """Where the true tokens of all `shards` are, in the order they lie in."""
    found = sorted(p for wanted in range(len(shards)) for p in positions(shards, wanted, ranks))
    return torch.tensor(found, device=device)


Span = tuple[int, int]  # first image token of a patch, and the one after its last


def spans(tokens: int, patches: int) -> list[Span]:
    """`tokens` cut into patches as evenly as they go."""
    shard = Shard(tokens, patches)
    return [(shard.start(i), shard.start(i + 1)) for i in range(patches)]


@dataclass(frozen=True)
class Keys:
    """In one block of keys: where the true ones of a call are, and where they belong in what is kept.

    Kept are the image keys of all patches, in their order, and behind them the text's.
    """

    image: torch.Tensor
    text: torch.Tensor
    start: int
    stop: int
    images: int  # kept of all patches

    @cached_property
    def order(self) -> torch.Tensor:
        """The keys of a whole call in the order they are kept."""
        return torch.cat([self.image, self.text])


class PatchTokens:
    """A picture's patches, and the text, each spread over the sequence ranks on its own.

    The same in calls of the whole picture as in those of one patch: the keys that a ring brings in one
    block are then those of the same tokens in both.
    """

    def __init__(self, groups: RankGroups, text_first: bool, patches: Sequence[Span], text: int):
        self._groups, self._text_first = groups, text_first
        ranks = groups.degrees.sequence
        self.patches = list(patches)
        self.images = [Shard(stop - start, ranks) for start, stop in patches]
        self.text = Shard(text, ranks)
        self.keys = cache(self._keys)
        self._order = cache(self._true_order)

    def sizes(self, which: range) -> tuple[int, int]:
        """Image and text tokens of this rank, padding included, in a call of some patches."""
        return sum(self.images[p].size for p in which), self.text.size if brings_text(which) else 0

    def own_image(self, tokens: torch.Tensor, which: range, dim: int = 1) -> torch.Tensor:
        """This rank's part of the tokens of some patches."""
        lengths = [self.images[p].length for p in which]
        parts = zip(which, tokens.split(lengths, dim), strict=True)
        rank = self._groups.sequence_rank
        return torch.cat([self.images[p].take(part, rank, dim) for p, part in parts], dim)

    def own_text(self, tokens: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """This rank's part of the text tokens."""
        return self.text.take(tokens, self._groups.sequence_rank, dim)

    def whole_image(self, own: torch.Tensor, which: range) -> torch.Tensor:
        """All tokens of some patches (B, tokens, D), of which this rank has `own`."""
        if self._groups.degrees.sequence == 1:
            return own
        return self._groups.gather_tokens(own).index_select(1, self._order(which))

    def _true_order(self, which: range) -> torch.Tensor:
        shards, ranks = [self.images[p] for p in which], range(self._groups.degrees.sequence)
        return self._tensor([at for i in range(len(shards)) for at in positions(shards, i, ranks)])

    def _keys(self, which: range) -> dict[int, list[Keys]]:
        """For a length of keys, per block of the ring: of joint attention, and of image tokens alone."""
        images = [self.images[p] for p in which]
        result = {
            sum(s.size for s in images) * self._groups.degrees.ulysses: self._blocks(which, images, None)
        }
        if brings_text(which) and self.text.length:
            at = 0 if self._text_first else len(images)
            shards = [*images[:at], self.text, *images[at:]]
            length = sum(s.size for s in shards) * self._groups.degrees.ulysses
            result[length] = self._blocks(which, shards, at)
        return result

    def _blocks(self, which: range, shards: list[Shard], text: int | None) -> list[Keys]:
        blocks = []
        for ranks in self._groups.key_blocks():
            kept = [sum(shard.valid(rank) for rank in ranks) for shard in self.images]
            image = [at for i in range(len(shards)) if i != text for at in positions(shards, i, ranks)]
            start, stop = sum(kept[: which.start]), sum(kept[: which.stop])
            of_text = [] if text is None else positions(shards, text, ranks)
            blocks.append(Keys(self._tensor(image), self._tensor(of_text), start, stop, sum(kept)))
        return blocks

    def _tensor(self, places: list[int]) -> torch.Tensor:
        return torch.tensor(places, dtype=torch.long, device=self._groups.device)


def brings_text(which: range) -> bool:
    """The first patch brings the text along; others see the keys and values it left."""
    return which.start == 0


class KeyValueCache:
    """Keys and values of every attention of a stage, as the last calls of each patch left them.

    It stands between the exchange of heads or blocks and the attention, so that every rank keeps what its
    attention sees: after Ulysses its heads of all tokens, in a ring the block of every rank.
    """

    def __init__(self, module: nn.Module):
        self._layer = ""
        self._kept: dict[tuple[str, int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self._hooks = [
            part.register_forward_pre_hook(lambda _module, _args, name=name: self._enter(name))
            for name, part in module.named_modules()
            if hasattr(part, "processor")
        ]

    @contextmanager
    def call(self, rows: int, tokens: PatchTokens, which: range, keep: bool) -> Iterator[None]:
        """Within, the blocks run on some patches of the group of rows number `rows`.

        Args:
            which: all patches, whose keys and values are then kept if told to `keep`; or fewer, which see
                what was kept of the others.
        """
        keys, whole = tokens.keys(which), len(which) == len(tokens.patches)

        def select(key: torch.Tensor, value: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
            where, name = keys[key.shape[2]][block], (self._layer, rows, block)
            if whole:
                seen = key.index_select(2, where.order), value.index_select(2, where.order)
                if keep:
                    self._kept[name] = seen
                return seen
            for kept, new in zip(self._kept[name], (key, value), strict=True):
                kept[:, :, where.start : where.stop] = new.index_select(2, where.image)
                if len(where.text):
                    kept[:, :, where.images :] = new.index_select(2, where.text)
            return self._kept[name]

        with keys_selected(select):
            yield

    def close(self) -> None:
        """Let go of what is kept."""
        self._kept = {}
        for hook in self._hooks:
            hook.remove()

    def _enter(self, layer: str) -> None:
        self._layer = layer
