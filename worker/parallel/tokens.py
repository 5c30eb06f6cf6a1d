"""A model whose tokens are spread over ranks, inside its own forward, as its plan says."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from itertools import takewhile
from typing import Any

import torch
from torch import nn

from worker.parallel import hooks
from worker.parallel.attention import seam
from worker.parallel.attention.blockwise import WithLogSumExp
from worker.parallel.attention.exchange import Exchange, FirstProductSummed
from worker.parallel.mesh import Mesh
from worker.parallel.parts import Parts
from worker.parallel.plan import (
    INSTEAD,
    Attend,
    Blocks,
    Carrier,
    Grid,
    Plan,
    PlanMismatch,
    Region,
    Tokens,
    Voxels,
)

Values = dict[str, Any]


class SpreadTokens:
    """Hooks on a model: its tokens are cut before a region, meet at the seam, and are gathered behind it.

    The model's forward, blocks and attention stay its own.

    Args:
        module: any transformer; every rank of the mesh calls it alike, with whole arguments.
        kernel: an attention with log-sum-exp, for the blocks of a ring.
        deaf: no rank hears of other ranks' keys. A picture that is then right proves nothing.

    Raises:
        PlanMismatch: the module has other names than the plan, or blocks with arguments the plan does not
            know.
    """

    def __init__(
        self,
        module: nn.Module,
        plan: Plan,
        mesh: Mesh,
        kernel: WithLogSumExp | None = None,
        deaf: bool = False,
    ):
        self.mesh, self.name = mesh, type(module).__name__
        self.parts = Parts(mesh.ranks, mesh.rank)
        self.exchange = Exchange(self.parts, mesh, kernel, deaf)
        self.spans: Mapping[str, tuple[int, int]] = {}  # of streams of which a call brings less than all
        self._modules = dict(module.named_modules())
        self._once: dict[tuple[str, int], tuple[Any, Any]] = {}
        self._grids: dict[str, torch.Size] = {}
        self._voxels: dict[str, Any] = {}  # sparse tensors, as they came
        self._prefixes: dict[str, int] = {}  # lengths, as this call of the model says
        self._hooks: list[Any] = []
        seam.catch_torch()
        for region in plan.regions:
            if region.optional and not all(self._has(name) for name in region.blocks):
                continue
            self._attach(region)
            if region.prefix:
                self._attach_prefix(module, region.prefix.length)
        self._modules = {}  # a stage takes out blocks of others

    def close(self) -> None:
        """Leave the module as it was."""
        for hook in reversed(self._hooks):
            hook.remove()

    def enter(self, lengths: Mapping[str, int]) -> None:
        """Another stage has entered the region, with so many tokens of each stream in all."""
        self._once.clear()
        for stream, length in lengths.items():
            self.parts.bring(stream, length, span=self.spans.get(stream))
        self.exchange.begin()

    def own(self, tensor: torch.Tensor, stream: str, dim: int = 1) -> torch.Tensor:
        """This rank's part of something on the tokens of a stream, or on the first of them."""
        start, stop = self.parts[stream].held
        start, stop = (min(end, tensor.shape[dim]) for end in (start, stop))
        return tensor.narrow(dim, start, stop - start)

    def whole(self, part: torch.Tensor, streams: str, dim: int = 1) -> torch.Tensor:
        """All tokens, of those that each rank has of some streams."""
        return self.exchange.whole(part, streams, dim)

    # ------------------------------------------------------------------ hooks

    def _attach(self, region: Region) -> None:
        lists = {name: self._blocks(name) for name in region.blocks}
        lists = {name: blocks for name, blocks in lists.items() if blocks}
        last = next(reversed(lists.values()))[-1]
        for name, blocks in lists.items():
            for i, block in enumerate(blocks):
                first = region.each or i == 0
                ends = region.each or (block is last and not region.at)
                self._attach_block(region, name, block, first, ends)
        for pattern, attends in region.attention.items():
            found, attends = self._matching(pattern), attends if isinstance(attends, tuple) else (attends,)
            if not found and pattern.split(".*")[0] in map(_module_of, lists) and not attends[0].optional:
                raise PlanMismatch(f"this {self.name} has no {pattern}, which its plan says attends")
            for module in found:
                self._attach_attention(module, _method_of(pattern), attends)
        for pattern, arguments in region.whole.items():
            for module in self._matching(pattern):
                self._attach_whole(module, _method_of(pattern), arguments)
        for name in region.at.split():
            self._hook(self._module(name), lambda _m, args: self._gather_first(region, args))
        for name in region.halo:
            for blocks in lists.values():
                for block in blocks:
                    self._attach_halo(block.get_submodule(name))

    def _attach_block(self, region: Region, name: str, block: nn.Module, first: bool, ends: bool) -> None:
        plan, method = region.blocks[name], _method_of(name)
        arguments = Arguments(block, plan, region, self.name, method)

        def before(
            _block: nn.Module, args: tuple[Any, ...], kwargs: Values
        ) -> tuple[tuple[Any, ...], Values]:
            values = arguments.named(args, kwargs)
            if first:
                self._enter(region, plan, values)
            for name, carrier in arguments.tables.items():
                if values.get(name) is not None and not (first and name in plan.cut):
                    values[name] = self._table(name, carrier, values[name])
            return arguments.back(values)

        self._hooks.append(hooks.before(block, method, before))
        if ends:
            self._hooks.append(
                hooks.after(block, method, lambda _m, _a, _k, output: self._leave(region, plan, output))
            )

    def _attach_attention(self, module: nn.Module, method: str, attends: tuple[Attend, ...]) -> None:
        if attends[0].linear:
            summed = FirstProductSummed(self.mesh, self.exchange.deaf)
            self._hooks.append(module.register_forward_pre_hook(lambda *_: summed.begin()))
            self._hooks.append(
                module.register_forward_hook(lambda _m, _a, output: summed.end(output), always_call=True)
            )
            return
        attention = self.exchange.module(attends, module)

        def after(_module: nn.Module, _args: Any, kwargs: Values, output: Any) -> None:
            seam.end()
            skipped = (kwargs.get("transformer_options") or {}).get(attends[0].unless)
            # Without an output the module raised, and says why itself.
            if output is not None and attention.calls == 0 and not skipped:
                raise PlanMismatch(
                    f"no attention of {type(module).__name__} in {self.name} came to the seam, so its tokens "
                    f"would attend to this rank's alone; choose PyTorch's attention, or {INSTEAD}"
                )

        def before(*_: Any) -> None:
            attention.calls = 0
            seam.begin(attention)

        self._hooks.append(hooks.before(module, method, before))
        self._hooks.append(hooks.after(module, method, after, always_call=True))

    def _attach_whole(self, module: nn.Module, method: str, arguments: Mapping[str, str]) -> None:
        names = list(inspect.signature(getattr(module, method or "forward")).parameters)
        streams = next(iter(arguments.values()))

        def before(
            _module: nn.Module, args: tuple[Any, ...], kwargs: Values
        ) -> tuple[tuple[Any, ...], Values]:
            values = dict(zip(names, args, strict=False)) | kwargs
            for argument, of in arguments.items():
                if values[argument] is not None:
                    values[argument] = self.whole(values[argument], of)
            return (), values

        def after(_module: nn.Module, _args: Any, _kwargs: Values, output: Any) -> Any:
            return self.parts.cut(output, streams, 1)

        self._hooks.append(hooks.before(module, method, before))
        self._hooks.append(hooks.after(module, method, after))

    def _attach_prefix(self, model: nn.Module, length: str) -> None:
        def note(_module: nn.Module, _args: Any, kwargs: Values) -> None:
            self._prefixes[length] = kwargs.get(length) or 0

        self._hooks.append(model.register_forward_pre_hook(note, with_kwargs=True))

    def _attach_halo(self, convolution: nn.Module) -> None:
        mesh = self.mesh

        def add(_module: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            rows = args[0]
            above, below = mesh.neighbours(rows[:, :, :1].contiguous(), rows[:, :, -1:].contiguous())
            return (torch.cat([part for part in (above, rows, below) if part is not None], 2),)

        self._hook(convolution, add)
        first, behind = int(mesh.rank > 0), int(mesh.rank + 1 < mesh.ranks)
        self._hook_output(convolution, lambda rows: rows[:, :, first : rows.shape[2] - behind])

    def _hook(self, module: nn.Module, before: Callable[..., Any]) -> None:
        self._hooks.append(module.register_forward_pre_hook(before))

    def _hook_output(self, module: nn.Module, change: Callable[[Any], Any]) -> None:
        self._hooks.append(module.register_forward_hook(lambda _m, _a, output: change(output)))

    def _has(self, name: str) -> bool:
        return name in self._modules

    def _module(self, name: str) -> nn.Module:
        name = _module_of(name)
        if name not in self._modules:
            raise PlanMismatch(f"this {self.name} has no {name}, and its plan says it has")
        return self._modules[name]

    def _blocks(self, name: str) -> list[nn.Module]:
        if "*" not in name:
            return list(self._module(name).children())
        if not (found := self._matching(name)):
            raise PlanMismatch(f"this {self.name} has no {name}, and its plan says it has")
        return found

    def _matching(self, pattern: str) -> list[nn.Module]:
        form = re.compile(re.escape(_module_of(pattern)).replace(r"\*", r"[^.]+"))
        return [module for name, module in self._modules.items() if form.fullmatch(name)]

    # ------------------------------------------------------------------ entering and leaving

    def _enter(self, region: Region, plan: Blocks, values: Values) -> None:
        self._once.clear()
        for name, carrier in plan.cut.items():
            for one, value in _each(carrier, values[name]):
                self._measure(region, one, value, values)
        for name, carrier in plan.cut.items():
            values[name] = self.parts.take(carrier, values[name])

    def _measure(self, region: Region, carrier: Carrier, value: Any, values: Values) -> None:
        *_, stream = carrier.streams.split()
        unit = values[region.units[stream]] if stream in region.units else 1
        if isinstance(carrier, Grid):
            self._grids[stream] = grid = value.shape[carrier.first : carrier.last + 1]
            length = grid.numel()
        elif isinstance(carrier, Voxels):
            self._voxels[stream] = value
            length = _each_as_many(value)
        elif isinstance(carrier, Tokens):
            length = value.shape[carrier.dim]
            if region.prefix and not values.get(region.prefix.kept):
                length -= self._prefixes[region.prefix.length]
        else:
            return  # a count tells nothing of lengths
        # Beside an edge, and in a sum over tokens, nothing may stand in for a token.
        every = bool(region.halo) or any(one.linear for one in _attends(region))
        self.parts.bring(stream, length, unit, self.spans.get(stream), every)
        self.exchange.begin()

    def _table(self, name: str, carrier: Carrier, value: Any) -> Any:
        if getattr(carrier, "masks_keys", False):
            self.exchange.masks[carrier.streams] = value if carrier.added else value.bool()
        key = (name, id(value))
        if key not in self._once:  # kept with the whole, so that its id stays its own
            self._once[key] = (value, self.parts.take(carrier, value))
        return self._once[key][1]

    def _leave(self, region: Region, plan: Blocks, output: Any) -> Any:
        if not isinstance(output, (tuple, list)):
            return self._whole(region, plan.returns[0], output)
        parts = zip(plan.returns, output, strict=True)
        return type(output)(self._whole(region, carrier, part) for carrier, part in parts)

    def _whole(self, region: Region, carrier: Carrier | str | None, part: Any) -> Any:
        if part is None or carrier is None:
            return part
        if isinstance(carrier, Grid):
            flat = self.whole(part.flatten(carrier.first, carrier.last), carrier.streams, carrier.first)
            return flat.unflatten(carrier.first, self._grids[carrier.streams])
        if isinstance(carrier, Voxels):
            rows = part.feats.unflatten(0, (len(part.layout), -1))
            whole = self.whole(rows, carrier.streams).flatten(0, 1)
            return self._voxels.pop(carrier.streams).replace(whole)
        streams, dim = (carrier, 1) if isinstance(carrier, str) else (carrier.streams, carrier.dim)
        if self.spans:
            return self._placed(part, streams, dim, region.gather.split())
        return self.exchange.whole(part, streams, dim, region.gather.split())

    def _placed(self, part: torch.Tensor, streams: str, dim: int, wanted: list[str]) -> torch.Tensor:
        """The tokens of a call that brings a span of them, where they belong in otherwise empty streams."""
        names, found = streams.split(), []
        pieces = part.split([self.parts[name].size for name in names], dim)
        for name, piece in zip(names, pieces, strict=True):
            one = self.parts[name]
            if name in wanted:
                shape = list(piece.shape)
                shape[dim] = one.length
                whole = piece.new_zeros(shape)
                if one.shard.length:
                    tokens = self.whole(piece, name, dim)
                    whole.narrow(dim, one.first, one.shard.length).copy_(tokens)
                piece = whole
            found.append(piece)
        return torch.cat(found, dim) if len(found) > 1 else found[0]

    def _gather_first(self, region: Region, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self.exchange.whole(args[0], region.gather, 1), *args[1:])


class Arguments:
    """The arguments of one block by name, checked against the plan."""

    def __init__(self, block: nn.Module, plan: Blocks, region: Region, model: str, method: str = ""):
        self._block, self._model, self._given = type(block).__name__, model, plan.names
        parameters = inspect.signature(getattr(block, method or "forward")).parameters.values()
        plain = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        self._names = plan.names or tuple(plain)
        self.tables = {**region.tables, **plan.tables}
        self._known = {*plan.cut, *self.tables, *plan.carries, *region.same}
        self._check(plain)
        gone = [name for name in (*plan.cut, *plan.carries) if name not in self._names]
        if gone and len(plain) == len(parameters):
            raise PlanMismatch(f"{self._block} of this {model} takes no {', '.join(gone)}; its plan says so")

    def named(self, args: tuple[Any, ...], kwargs: Values) -> Values:
        """All arguments of a call by name."""
        values = dict(zip(self._names, args, strict=False))
        values.update(kwargs)
        if len(values) < len(args) + len(kwargs):
            raise PlanMismatch(f"{self._block} of {self._model} gets more arguments than it names")
        self._check(values)
        return values

    def back(self, values: Values) -> tuple[tuple[Any, ...], Values]:
        """As the block is called with them."""
        return tuple(values.pop(name) for name in takewhile(values.__contains__, self._given)), values

    def _check(self, names: Any) -> None:
        new = [name for name in names if name not in self._known]
        if new:
            raise PlanMismatch(
                f"{self._block} of this {self._model} takes {', '.join(new)}, which its plan does not know: "
                "it could lie along tokens"
            )


def _module_of(name: str) -> str:
    return name.partition(":")[0]


def _method_of(name: str) -> str:
    return name.partition(":")[2]


def _attends(region: Region) -> list[Attend]:
    """All attentions of a region."""
    every = (one if isinstance(one, tuple) else (one,) for one in region.attention.values())
    return [attend for attends in every for attend in attends]


def _each_as_many(voxels: Any) -> int:
    """How many voxels each of the batch has. Raises PlanMismatch where they differ."""
    lengths = {rows.stop - rows.start for rows in voxels.layout}
    if len(lengths) > 1:
        raise PlanMismatch(
            f"shapes of {min(lengths)} to {max(lengths)} voxels in one batch are not spread over ranks; make "
            "one shape at a time, or set ulysses_degree and ring_degree to 1"
        )
    return lengths.pop()


def _each(carrier: Any, value: Any) -> list[tuple[Carrier, Any]]:
    if isinstance(carrier, tuple):
        return list(zip(carrier, value, strict=True))
    return [(carrier, value)]
