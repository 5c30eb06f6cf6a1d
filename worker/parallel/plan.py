"""The plan of a model: where its tokens are. Every parallel method reads it and knows nothing else of it.

A plan is a tuple of regions. In a region tokens stay split: they are cut where its first block begins and
gathered where it ends. Streams (image, text, audio ...) are sequences of tokens that are split each by
itself; a sequence of several is written in its order, "text image". In it "*" are tokens that every rank has
whole, because the model makes them anew in every block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from comfy_xdit.protocol.errors import InvalidInput

WHOLE = "*"


@dataclass(frozen=True)
class Tokens:
    """A tensor, or a nested tuple or list of them, with one entry per token of some streams.

    Args:
        dim: where the tokens lie; where it differs (between versions of a class) a tuple of them: the one
            that is not 1; or a mapping: by the tensor's number of dimensions. A dimension of 1 broadcasts
            and stays whole, like a tensor without tokens.
        ndim: a tensor with another number of dimensions has no tokens.
        masks_keys: a key mask (B, tokens) from which the model makes the mask of an attention of its own
            tokens only; the seam makes that mask of the whole again. It says which keys count (not 0),
            whatever its dtype; or it is `added` to the scores. One of all streams of an attention's keys, in
            their order, may be (B, 1, 1, tokens) too.
        last: it lies along the last tokens of its one stream, as many as it has: a part of it along the last
            ones of the part.
    """

    streams: str
    dim: int | tuple[int, ...] | Mapping[int, int] = 1
    ndim: int | None = None
    masks_keys: bool = False
    added: bool = False
    last: bool = False


@dataclass(frozen=True)
class Grid:
    """A tensor whose tokens fill the dimensions `first` to `last`: in a part they are rows of one column."""

    streams: str
    first: int
    last: int


@dataclass(frozen=True)
class Frames:
    """A tensor of `ndim` dimensions with one entry per frame along dim 1; in a part, one per token."""

    streams: str
    ndim: int


@dataclass(frozen=True)
class Compressed:
    """An object that keeps one entry (B, entries, ...) for every so many tokens, or a tensor in its place.

    In a part it keeps one per token.

    Args:
        data, entries, every: its attributes: the tensor, its number of entries, the tokens of each.
    """

    streams: str
    data: str
    entries: str
    every: str


@dataclass(frozen=True)
class GroupedMask:
    """An added mask that an object keeps for two groups of queries, or a tensor; in a part that of all pairs.

    Args:
        start, count: its attributes: the first query of the second group, and how many it has; queries behind
            it have no mask.
        before, group: masks (1, 1, 1, keys) of the queries before it, and (1, 1, count, keys) of its own.
    """

    streams: str
    start: str
    count: str
    before: str
    group: str


@dataclass(frozen=True)
class Voxels:
    """A sparse tensor of ComfyUI's, with `feats` (rows, D) at `coords` (rows, 4); or a tensor (rows, D).

    Each of the batch has as many rows, those of one after those of another; its `layout` has them as slices.
    """

    streams: str


@dataclass(frozen=True)
class Named:
    """A dictionary with entries that lie along tokens; what is no dictionary is passed as it is."""

    entries: Mapping[str, Carrier]
    streams: str = ""


@dataclass(frozen=True)
class Spans:
    """A list of (first token, end or None, anything more) over some streams.

    A tensor among the more has one entry for every token of its span.
    """

    streams: str


@dataclass(frozen=True)
class Count:
    """How many of a stream's first tokens are special; in units of so many tokens as its region says."""

    streams: str


Carrier = Tokens | Grid | Frames | Compressed | GroupedMask | Voxels | Named | Spans | Count


@dataclass(frozen=True)
class Attend:
    """One attention between tokens.

    Args:
        query: the streams of its queries, in their order.
        key: those of its keys and values; none is those of its queries.
        linear: without softmax: the first matrix product in the module sums over tokens.
        counted: the module drops tokens itself, so ranks tell each other how many are left.
        window: the module's attribute that says how many tokens away a query still sees a key (none: all);
            the mask that the module makes of it, of this rank's tokens, is made anew.
        causal: a causal attention in the module is one between tokens that every rank has whole.
        optional: some models of the class have no such module.
        unless: an entry of `transformer_options` with which the module does not attend.
    """

    query: str
    key: str = ""
    linear: bool = False
    counted: bool = False
    window: str = ""
    causal: bool = False
    optional: bool = False
    unless: str = ""

    @property
    def keys(self) -> str:
        """The streams of the keys."""
        return self.key or self.query


@dataclass(frozen=True)
class Blocks:
    """One list of blocks.

    Args:
        cut: arguments of its first block that enter whole, and what they carry. A tuple of carriers is for an
            argument that is a tuple or list.
        returns: the streams of each output of a block; None for an output that is not read.
        carries: arguments that are split already when they come, and the streams of each.
        tables: as those of the region, for this list only.
        names: the arguments in their order, of blocks that do not declare all (`*args`).
    """

    cut: Mapping[str, Carrier | tuple[Carrier, ...]] = field(default_factory=dict)
    returns: tuple[Carrier | str | None, ...] = ()
    carries: Mapping[str, str] = field(default_factory=dict)
    tables: Mapping[str, Carrier] = field(default_factory=dict)
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prefix:
    """The first tokens of a sequence, which see none but each other: "*", as every rank has them whole.

    Args:
        length: the argument of the model's call that says how many.
        kept: the argument of a block that is not empty where their keys come in their place.
    """

    length: str
    kept: str


@dataclass(frozen=True)
class Region:
    """Blocks between which tokens stay split.

    Names of modules may have a method behind them (`blocks:forward_text`), which the model calls in place of
    the module.

    Args:
        blocks: module lists in the order they run; or modules, as `blocks.*.attn`, of blocks that see tokens
            whole but there.
        attention: modules (`blocks.*.attn`, `*` is one name) that attend between tokens; a tuple for one that
            does so several times. Every other module of a block treats each token by itself, or sees with
            each of them the same whole thing (cross attention to a whole prompt).
        tables: arguments of any block that lie along tokens but do not pass from block to block.
        same: arguments that are passed as they are. A block with an argument that is nowhere in the plan is
            refused: it could lie along tokens.
        gather: the streams that are whole behind the region; others stay split, as nothing reads them.
        at: the module before which they are gathered, in its first argument, or several of which a call has
            one; none is behind the last block.
        each: they are cut and gathered in every block.
        whole: modules that mix tokens in a way of their own, and so see all: arguments and their streams, of
            which the first is the output's, too. Attention in them may be one of "*".
        prefix: of the sequence that is cut.
        units: streams that are only cut between units (rows of a picture): the argument that says how many
            tokens a unit has.
        halo: convolutions of 3 (B, C, tokens) or 3 x 3 (B, C, rows, columns) in a block, which see a token or
            a row of each neighbour.
        optional: some models of the class have no such blocks.
        control: lists of ControlNet residuals: the list of blocks after which each is added, and its streams.
    """

    blocks: Mapping[str, Blocks]
    attention: Mapping[str, Attend | tuple[Attend, ...]] = field(default_factory=dict)
    tables: Mapping[str, Carrier | tuple[Carrier, ...]] = field(default_factory=dict)
    same: frozenset[str] = frozenset()
    gather: str = ""
    at: str = ""
    each: bool = False
    whole: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    prefix: Prefix | None = None
    units: Mapping[str, str] = field(default_factory=dict)
    halo: tuple[str, ...] = ()
    optional: bool = False
    control: Mapping[str, tuple[str, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """Where a model's tokens are.

    Args:
        patched: the stream that PipeFusion cuts into patches; none where it cannot.
        skips: for block i of n, the earlier block whose output its forward reads too.
    """

    regions: tuple[Region, ...]
    patched: str = ""
    skips: Callable[[int, int], int | None] | None = None

    @property
    def streams(self) -> tuple[str, ...]:
        """The streams that are cut, in the order they are named."""
        blocks = (plan for region in self.regions for plan in region.blocks.values())
        cut = (carrier for plan in blocks for carrier in plan.cut.values())
        each = (one for carrier in cut for one in (carrier if isinstance(carrier, tuple) else (carrier,)))
        return tuple(dict.fromkeys(name for one in each for name in one.streams.split()))


# The remedy for what a call brings that cannot be split.
INSTEAD = "choose cfg_parallel_degree or data_parallel_degree in place of ulysses_degree and ring_degree"


class PlanMismatch(InvalidInput):
    """The model is not the one its plan was written for, or brings what cannot be split."""


def of_each(carrier: Any, values: Any) -> list[tuple[Any, Any]]:
    """The carriers of the parts of a tuple or list, with them: one for all, or one each."""
    carriers = carrier if isinstance(carrier, tuple) else (carrier,) * len(values)
    return list(zip(carriers, values, strict=True))
