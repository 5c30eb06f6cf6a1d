"""What one model's ranks exchange: keys at the seam, tokens behind a region, sums of linear attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from worker.parallel.attention.blockwise import WithLogSumExp
from worker.parallel.attention.kept_keys import Kept, KeptKeys
from worker.parallel.attention.usp import USP, Order
from worker.parallel.mesh import Mesh
from worker.parallel.parts import Part, Parts, Shard, added_up
from worker.parallel.plan import INSTEAD, WHOLE, Attend, PlanMismatch


class Exchange:
    """Of one model over one mesh, call after call.

    Args:
        parts: what the present call brings of every stream.
    """

    def __init__(self, parts: Parts, mesh: Mesh, kernel: WithLogSumExp | None = None, deaf: bool = False):
        self.parts, self.mesh, self.kernel, self.deaf = parts, mesh, kernel, deaf
        self.masks: dict[str, torch.Tensor] = {}  # whole key masks (B, tokens) of streams
        self.kept: KeptKeys | None = None  # PipeFusion's
        self._orders: dict[str, Order] = {}

    def begin(self) -> None:
        """A stream was measured: what was known of the ones before may be over."""
        self._orders.clear()
        self.masks.clear()

    def module(self, attends: tuple[Attend, ...], module: nn.Module | None = None) -> ModuleAttention:
        """The attention of one planned module; `module` is asked for the reach of its window."""
        return ModuleAttention(self, attends, module)

    def whole(
        self, part: torch.Tensor, streams: str, dim: int = 1, which: Sequence[str] | None = None
    ) -> torch.Tensor:
        """All tokens of a sequence of which each rank has its part; `which` streams only, if given."""
        names = streams.split()
        wanted = [n for n in names if n != WHOLE and (which is None or n in which)]
        if not wanted or self.mesh.ranks == 1:
            return part
        if wanted == names:
            return self._gather(part, streams, dim)
        known = sum(self.parts[name].size for name in names if name != WHOLE)
        sizes = [part.shape[dim] - known if n == WHOLE else self.parts[n].size for n in names]
        pieces = zip(names, part.split(sizes, dim), strict=True)
        return torch.cat([self._gather(p, n, dim) if n in wanted else p for n, p in pieces], dim)

    def _gather(self, part: torch.Tensor, streams: str, dim: int) -> torch.Tensor:
        names, parts = streams.split(), self.parts
        every = self.mesh.gather(parts.true(part, streams, dim), parts.sizes(streams), dim)
        if len(names) == 1:
            return torch.cat(every, dim)
        shards = [parts[name].shard for name in names]
        split = [whole.split([s.size(rank) for s in shards], dim) for rank, whole in enumerate(every)]
        return torch.cat([of_rank[i] for i in range(len(names)) for of_rank in split], dim)

    def order(self, streams: str, parts: Sequence[Part], device: torch.device) -> Order:
        """Where tokens are in the whole of a sequence; made once per call."""
        if streams not in self._orders:
            self._orders[streams] = Order(parts, device)
        return self._orders[streams]


class _Spread(NamedTuple):
    """The two sequences of one attention, and how the ranks have them."""

    attend: Attend
    queries: list[Part]
    keys: list[Part]
    kept: Kept | None


class ModuleAttention:
    """The attention of one planned module: its n-th call is that of the n-th of `attends`, or of the last."""

    def __init__(self, exchange: Exchange, attends: tuple[Attend, ...], module: nn.Module | None):
        self._exchange, self._attends, self._module = exchange, attends, module
        self.causal = any(attend.causal for attend in attends)
        self.calls = 0
        self._mask: tuple[Any, dict[Any, torch.Tensor]] = (None, {})  # the last one, and its blocks

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float | None,
        local: Callable[..., torch.Tensor],
    ) -> torch.Tensor:
        """Attention of this rank's queries (B, heads, tokens, width) to the keys of all ranks."""
        attend = self._attends[min(self.calls, len(self._attends) - 1)]
        self.calls += 1
        exchange = self._exchange
        if attend.query == attend.keys == WHOLE:
            return self._shared(query, key, value, mask, local)
        queries, keys = self._parts(attend.query, query), self._parts(attend.keys, key)
        query = self._true(query, attend.query, queries)
        key, value = (self._true(tensor, attend.keys, keys) for tensor in (key, value))
        if attend.counted:
            sizes = self._counted(query, key)
        else:
            sizes = [self._sizes(attend.query, queries), self._sizes(attend.keys, keys)]
        self._check(attend, sizes, query, key)
        if exchange.deaf:
            return self._held(local(query, key, value, None), attend.query, queries)
        reach = getattr(self._module, attend.window) if attend.window else None
        mask = self._whole_mask(attend.keys, keys, key, mask) if reach is None else None
        kept = self._kept(attend.keys, keys, key.device)
        usp = USP(exchange.mesh, *sizes, exchange.kernel, kept)
        spread = _Spread(attend, queries, keys, kept)

        def bias(block: int, heads: slice) -> torch.Tensor | None:
            if reach is not None:
                return self._window(spread, reach, query, block)
            return None if mask is None else self._bias(spread, mask, block, heads)

        out = usp(query, key, value, bias, scale, local)
        return self._held(out, attend.query, queries)

    def _shared(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        local: Callable[..., torch.Tensor],
    ) -> torch.Tensor:
        """Of tokens that every rank has whole: each attends for its share of the queries."""
        mesh = self._exchange.mesh
        shard = Shard(query.shape[2], mesh.ranks)
        own = shard.span(mesh.rank)
        if self._exchange.deaf:
            seen = Shard(key.shape[2], mesh.ranks).span(mesh.rank)
            key, value, mask = key[:, :, seen], value[:, :, seen], None
        if mask is not None and mask.shape[-2] > 1:
            mask = mask[..., own, :]
        out = local(query[:, :, own], key, value, mask)
        return torch.cat(mesh.gather(out, shard.sizes, 2), 2)

    # ------------------------------------------------------------------ tokens

    def _parts(self, streams: str, tensor: torch.Tensor) -> list[Part]:
        """How the tokens of a sequence are spread; for the exchange, also those that every rank has."""
        parts, mesh = self._exchange.parts, self._exchange.mesh
        names = streams.split()
        if WHOLE not in names:
            return [parts[name] for name in names]
        known = sum(parts[name].size for name in names if name != WHOLE)
        length = tensor.shape[2] - known
        rest = Part(length, 0, Shard(length, mesh.ranks), mesh.rank)
        return [rest if name == WHOLE else parts[name] for name in names]

    def _sizes(self, streams: str, parts: list[Part]) -> list[int]:
        """How many tokens of a sequence every rank brings to the exchange."""
        return added_up(parts) if WHOLE in streams.split() else self._exchange.parts.sizes(streams)

    def _kept(self, streams: str, keys: list[Part], device: torch.device) -> Kept | None:
        """Keys and values of other calls, which this call's attention sees too."""
        exchange = self._exchange
        if exchange.kept is None:
            return None
        lengths = {name: part.length for name, part in zip(streams.split(), keys, strict=True)}

        def arriving(block: int) -> torch.Tensor:
            return exchange.order(streams, keys, device).of(exchange.mesh.block(block))

        return exchange.kept.of(self, self.calls, lengths, arriving, device)

    def _true(self, tensor: torch.Tensor, streams: str, whole: list[Part]) -> torch.Tensor:
        """What this rank brings to the exchange."""
        parts, rank = self._exchange.parts, self._exchange.mesh.rank
        names = streams.split()
        if WHOLE not in names:
            return parts.true(tensor, streams, 2)
        sizes = [p.length if n == WHOLE else parts[n].size for n, p in zip(names, whole, strict=True)]
        pieces = []
        for name, part, piece in zip(names, whole, tensor.split(sizes, 2), strict=True):
            span = part.shard.span(rank) if name == WHOLE else slice(0, part.true)
            pieces.append(piece[:, :, span])
        return torch.cat(pieces, 2)

    def _held(self, out: torch.Tensor, streams: str, whole: list[Part]) -> torch.Tensor:
        """The output for all tokens this rank computes on: of whole streams, all."""
        exchange, names = self._exchange, streams.split()
        if WHOLE not in names:
            return exchange.parts.held(out, streams, 2)
        pieces = []
        sizes = [part.true for part in whole]
        for name, part, piece in zip(names, whole, out.split(sizes, 2), strict=True):
            if name == WHOLE:
                pieces.append(torch.cat(exchange.mesh.gather(piece, part.shard.sizes, 2), 2))
            else:
                pieces.append(exchange.parts.held(piece, name, 2))
        return torch.cat(pieces, 2)

    def _counted(self, query: torch.Tensor, key: torch.Tensor) -> list[list[int]]:
        """How many tokens every rank has left, where the module dropped some."""
        mesh = self._exchange.mesh
        own = torch.tensor([[query.shape[2], key.shape[2]]], device=query.device)
        return torch.cat(mesh.gather(own, [1] * mesh.ranks, 0)).T.tolist()

    def _check(self, attend: Attend, sizes: list[list[int]], query: torch.Tensor, key: torch.Tensor) -> None:
        rank = self._exchange.mesh.rank
        brought, expected = (query.shape[2], key.shape[2]), (sizes[0][rank], sizes[1][rank])
        if brought != expected:
            raise PlanMismatch(
                f"attention of {attend.query} to {attend.keys}: this rank brings {brought} queries and keys, "
                f"its plan says {expected}"
            )

    # ------------------------------------------------------------------ masks

    def _whole_mask(
        self, streams: str, keys: list[Part], key: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor | None:
        """(B or 1, heads or 1, queries or 1, all keys). One made of this rank's tokens is made anew."""
        if mask is None:
            return None
        masks, names = self._exchange.masks, streams.split()
        if mask.shape[-1] == sum(part.length for part in keys):
            return mask
        if not masks:
            raise PlanMismatch(
                f"a mask over {mask.shape[-1]} keys where there are {sum(part.length for part in keys)} "
                f"({streams}); {INSTEAD}"
            )
        if mask.shape[1] > 1 and not torch.equal(mask, mask[:, :1].expand_as(mask)):
            raise PlanMismatch(
                f"a mask of this rank's {mask.shape[-1]} keys ({streams}) that is another one for each of "
                f"{mask.shape[1]} heads, of which the whole is not known; {INSTEAD}"
            )
        if streams in masks:  # of the whole sequence already
            given = masks[streams].reshape(-1, 1, 1, masks[streams].shape[-1])
            return given if given.dtype == torch.bool else given.to(mask.dtype)
        given = next(iter(masks.values()))
        # Of a stream without a mask every key counts.
        every = torch.ones_like(given[:1, :1]) if given.dtype == torch.bool else given.new_zeros(1, 1)
        whole = [
            (masks[name] if name in masks else every.expand(1, part.length)).expand(len(key), -1)
            for name, part in zip(names, keys, strict=True)
        ]
        return torch.cat(whole, 1)[:, None, None]

    def _window(self, spread: _Spread, reach: int, query: torch.Tensor, block: int) -> torch.Tensor:
        """What is added to scores: nothing up to `reach` tokens away, and beyond what leaves none."""
        exchange, mesh = self._exchange, self._exchange.mesh
        attend = spread.attend
        rows = exchange.order(attend.query, spread.queries, query.device).of(mesh.block(mesh.ring_rank))
        columns = exchange.order(attend.keys, spread.keys, query.device).of(mesh.block(block))
        beyond = (rows[:, None] - columns).abs() > reach
        least = torch.finfo(query.dtype).min
        return query.new_zeros(beyond.shape).masked_fill_(beyond, least)[None, None]

    def _bias(self, spread: _Spread, mask: torch.Tensor, block: int, heads: slice) -> torch.Tensor:
        """The mask between the queries of this rank's Ulysses group and the keys of a block of the ring."""
        if self._mask[0] is not mask or spread.kept is not None:
            self._mask = (mask, {})
        if block not in self._mask[1]:
            self._mask[1][block] = self._cut_mask(spread, mask, block)
        cut = self._mask[1][block]
        return cut[:, heads] if cut.shape[1] > 1 else cut

    def _cut_mask(self, spread: _Spread, mask: torch.Tensor, block: int) -> torch.Tensor:
        exchange, mesh, attend = self._exchange, self._exchange.mesh, spread.attend
        seen = spread.kept.seen(block) if spread.kept is not None else None
        if seen is None:
            seen = exchange.order(attend.keys, spread.keys, mask.device).of(mesh.block(block))
        cut = mask.index_select(-1, seen)
        if mask.shape[-2] == 1:
            return cut
        length = sum(part.length for part in spread.queries)
        if mask.shape[-2] != length:
            raise PlanMismatch(
                f"a mask for {mask.shape[-2]} queries where there are {length} ({attend.query}); {INSTEAD}"
            )
        order = exchange.order(attend.query, spread.queries, mask.device).of(mesh.block(mesh.ring_rank))
        return cut.index_select(-2, order)


class FirstProductSummed(TorchFunctionMode):
    """Linear attention: its first matrix product is a sum over tokens, so the ranks' products add up.

    Args:
        deaf: they do not.
    """

    def __init__(self, mesh: Mesh, deaf: bool = False):
        super().__init__()
        self._mesh, self._deaf, self._waiting = mesh, deaf, False

    def begin(self) -> None:
        """The module runs."""
        self._waiting = True
        self.__enter__()

    def end(self, output: Any) -> None:
        """The module has run; without an output it raised, and says why itself."""
        self.__exit__(None, None, None)
        if self._waiting and output is not None:
            raise PlanMismatch("a linear attention without a matrix product: its tokens would not meet")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is not torch.matmul or not self._waiting:
            return result
        self._waiting = False
        return result if self._deaf else self._mesh.sum(result)
