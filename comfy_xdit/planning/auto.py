"""Strategy `auto`: a layout for one model on this machine, chosen once, when it is loaded.

The number of ranks is fixed when they start, and a loader knows the model but not the picture. The
plan is for DEFAULT_PIXELS squared with the guidance the family uses; docs/decisions/008-planner.md.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from comfy_xdit import __version__
from comfy_xdit.planning import planner
from comfy_xdit.planning.cluster import Cluster
from comfy_xdit.planning.measured import Measured
from comfy_xdit.planning.planner import Plan
from comfy_xdit.planning.request import ModelShape, Request
from comfy_xdit.planning.topology import this_machine
from comfy_xdit.protocol import proofs, remembered
from comfy_xdit.protocol.description import ModelDescription
from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.messages import Check, Prove
from comfy_xdit.protocol.parallel import Automatic, ParallelConfig, available_devices
from comfy_xdit.protocol.proofs import Proof
from comfy_xdit.protocol.spec import ModelSpec
from comfy_xdit.ranks.registry import running_groups, worker_group

NAME = "descriptions.json"
KEPT = 200
PROBE = ParallelConfig(devices=("cpu",))


@dataclass(frozen=True)
class Chosen:
    """What `auto` chose for a model and a request on a cluster, and why."""

    layout: ParallelConfig
    plan: Plan
    request: Request
    cluster: Cluster
    shard: bool = False

    def again(self) -> Plan:
        """The plan that would be made now, with the times measured since."""
        return planner.plan(self.request, self.cluster, Measured.load(), shard=self.shard)


# Kept as long as the process: times measured meanwhile must not restart ranks in the middle of work.
_chosen: dict[tuple[ModelSpec, Automatic], Chosen] = {}
_by_class: dict[tuple[str, ParallelConfig], str] = {}  # why, of ComfyUI's classes, by path and layout


def layout_of(
    parallel: ParallelConfig | Automatic, spec: ModelSpec, interrupted: Callable[[], bool] | None = None
) -> ParallelConfig:
    """The layout itself, or the one that `auto` chooses for the transformer `spec`.

    Raises:
        InvalidInput: the file is no transformer a rank can load, or one device is to share weights, or
            `parallel` is neither.
        Interrupted: the person stopped it while a rank was starting.
    """
    if isinstance(parallel, ParallelConfig):
        return parallel
    _check_automatic(parallel)
    available = available_devices()
    devices = parallel.devices or available
    if len(devices) == 1:  # nothing to choose, so nobody need be asked
        return ParallelConfig(devices=devices, shard_weights=parallel.shard_weights).check(available)
    shard, key = parallel.shard_weights, (spec, replace(parallel, devices=devices))
    if key not in _chosen:
        told = description(spec, interrupted)
        if told.comfyui:
            told = _proven(told, spec, _of_class(replace(told, not_spread=""), devices, shard), interrupted)
            layout = _of_class(told, devices, shard).check(available)
            _by_class[spec.path, layout] = _why_of_class(told)
            return layout
        cluster = machine(devices)
        kind = cluster.device.kind
        request = Request.picture(ModelShape.of(told), dtype_bytes=dtype_bytes(told, spec, kind))
        _chosen[key] = _choose(request, cluster, devices, shard)
    return _chosen[key].layout


def _choose(request: Request, cluster: Cluster, devices: tuple[str, ...], shard: bool) -> Chosen:
    """What an equal model has on these devices, so that both use the same ranks, or a new plan."""
    for (_, asked), chosen in _chosen.items():
        if (asked.devices, chosen.request, chosen.shard) == (devices, request, shard):
            return chosen
    plan = planner.plan(request, cluster, Measured.load(), shard=shard)
    layout = plan.pick.layout
    layout = replace(layout, devices=devices[: layout.world_size]).check(available_devices())
    return Chosen(layout, plan, request, cluster, shard)


def _of_class(told: ModelDescription, devices: tuple[str, ...], shard: bool) -> ParallelConfig:
    """For a class of ComfyUI's own, of which no time is known: both prompts at once where it has two.

    The devices that are left spread the tokens, where that is proven. Weights are shared by all, or by none.
    """
    cfg = 2 if told.guided and told.rows_apart else 1
    left, heads = len(devices) // cfg, told.heads or 1
    # Equal work for all: only divisors of the heads.
    ulysses = 1 if told.not_spread or shard else max(n for n in range(1, left + 1) if heads % n == 0)
    layout = ParallelConfig(
        data_parallel_degree=left if shard else 1,
        cfg_parallel_degree=cfg,
        ulysses_degree=ulysses,
        shard_weights=shard,
    )
    return replace(layout, devices=devices[: layout.world_size])


def _proven(
    told: ModelDescription,
    spec: ModelSpec,
    layout: ParallelConfig,
    interrupted: Callable[[], bool] | None,
) -> ModelDescription:
    """The description with what the ranks of `layout` prove of a class that nothing is known of yet.

    Seconds, once for each class and ComfyUI; the ranks are those that the model then has.
    """
    if told.not_spread != proofs.UNPROVEN or layout.ulysses_degree == 1:
        return told
    group = worker_group(layout.check(available_devices()))
    answer = group.call(Prove(spec.comfyui, told.family), interrupted=interrupted).value
    why = next(proof.why for proof in map(Proof.of, answer) if proof.method == proofs.TOKENS)
    return replace(told, not_spread=why)


def _why_of_class(told: ModelDescription) -> str:
    both = "both prompts at once" if told.guided and told.rows_apart else "one prompt at a time"
    tokens = f"tokens are not spread: {told.not_spread}" if told.not_spread else "its tokens are spread"
    return f"ComfyUI's {told.family}: {both}; {tokens}"


def layout_beside(parallel: ParallelConfig | Automatic) -> ParallelConfig:
    """The layout itself, or for `auto` the one whose ranks already run: what loads a VAE alone.

    A VAE is spread over all ranks of any layout, and ranks of its own would take the model's place.
    Without any it is all devices, on CPU at most two.

    Raises:
        InvalidInput: `parallel` is neither.
    """
    if isinstance(parallel, ParallelConfig):
        return parallel
    _check_automatic(parallel)
    available = available_devices()
    devices = parallel.devices or available
    running = [g.parallel for g in running_groups() if g.pids and set(g.parallel.devices) <= set(devices)]
    if running:
        return max(running, key=lambda layout: layout.world_size)
    count = len(devices) if devices[0] != "cpu" else min(2, os.cpu_count() or 1, len(devices))
    return ParallelConfig(ulysses_degree=count, devices=devices[:count])


def _check_automatic(parallel: Any) -> None:
    """Raise InvalidInput for what is no layout: an API workflow may hold anything at a socket."""
    if not isinstance(parallel, Automatic):
        raise InvalidInput(
            f"parallel is {str(parallel)[:100]!r}, which is no layout; link it to an 'xDiT Parallel Config' "
            "(XDiTParallelConfig), or leave it out."
        )


def chosen_for(layout: ParallelConfig) -> list[tuple[str, Chosen]]:
    """Path of the model and choice, of every model that runs under `layout` because `auto` chose it."""
    return [(spec.path, chosen) for (spec, _), chosen in _chosen.items() if chosen.layout == layout]


def classes_for(layout: ParallelConfig) -> list[tuple[str, str]]:
    """Path of the model and why, of every model of a ComfyUI's class for which `auto` chose `layout`."""
    return [(path, why) for (path, chosen), why in _by_class.items() if chosen == layout]


def description(spec: ModelSpec, interrupted: Callable[[], bool] | None = None) -> ModelDescription:
    """What a rank says of the transformer `spec` from its header; no weight is read.

    Families are known in the ranks alone. A group that runs is asked; without one a CPU rank
    starts, which goes when other ranks are needed, or stays when one is the plan. The answer is
    remembered as long as the file is the same.
    """
    chosen_by = f"{spec.configuration} {spec.comfyui or ''} {'checkpoint' * spec.checkpoint}"
    key = f"{__version__} {spec.path} {spec.stamp} {spec.weight_dtype} {chosen_by}"
    held = remembered.read(NAME, _check)
    if key in held:
        return _as_proven(ModelDescription.of(held[key]), spec)
    running = [group for group in running_groups() if group.pids]
    group = running[0] if running else worker_group(PROBE)
    told = group.call(Check(spec, ParallelConfig()), ranks=(0,), interrupted=interrupted).value

    def change(models: dict[str, Any]) -> bool:
        models[key] = told
        for oldest in list(models)[:-KEPT]:
            del models[oldest]
        return True

    remembered.update(NAME, _check, change)
    return _as_proven(ModelDescription.of(told), spec)


def _as_proven(told: ModelDescription, spec: ModelSpec) -> ModelDescription:
    """A description with what is proven of a ComfyUI's class by now."""
    if spec.comfyui is None or not told.planned:
        return told
    return replace(told, not_spread=proofs.why_not_spread(spec.comfyui, told.family))


def _check(models: Any) -> None:
    """Raise ValueError for what holds something that is no description."""
    try:
        for told in models.values():
            ModelDescription.of(told)
    except (AttributeError, TypeError) as error:
        raise ValueError(f"not descriptions of models ({error!r})") from error


def dtype_bytes(told: ModelDescription, spec: ModelSpec, kind: str) -> int:
    """Bytes per number in ranks on devices of this `kind` (worker/transformer/transformer.py)."""
    name = spec.weight_dtype
    if name == "default":
        name = "fp32" if kind == "cpu" or told.stored == "float32" else "half"
    return 4 if name == "fp32" else 2


@lru_cache
def machine(devices: tuple[str, ...]) -> Cluster:
    """The cluster these devices are; asked of the machine once."""
    return this_machine(devices)
