"""Whether a plan is right on the ComfyUI at hand: a tiny model of the class, one rank against all.

A version can keep every name and still change what happens between the blocks, and then the picture is wrong
in silence. So a class is spread only where tiny models of it were, exactly, with every kind of call; and
where leaving out what other ranks' keys say made a difference. What came of it is remembered
(comfy_xdit/protocol/proofs.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import comfy.ldm.modules.attention
import torch
from torch import nn

from comfy_xdit.protocol import proofs
from comfy_xdit.protocol.proofs import Kind, Proof
from comfy_xdit.protocol.spec import HostComfyUI
from worker.models.comfyui.cases import CASES, Case, Draw
from worker.models.comfyui.cases.models import given, tiny_model
from worker.models.comfyui.spreading import Spread, candidates
from worker.models.comfyui.staged import difference_in_patches
from worker.models.plans.traits import traits_of
from worker.parallel import Lockstep, OutOfStep, Plan, PlanMismatch, RankGroups

SAME, OTHER = 1e-5, 1e-4  # relative L2: at most, and at least once ranks are deaf
# What a class raises where something does not fit it.
FAILURES = (
    RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError,
    ImportError, PlanMismatch,
)  # fmt: skip
NO_MEMORY = ("out of memory", "can't allocate memory")
Result = TypeVar("Result")
_proven: dict[tuple[str, str], Proof] = {}  # in this process, of its one ComfyUI, by class and method


class FailedAlone(Exception):
    """A rank failed where another did not, or for want of memory: this says nothing of the plan."""


def prove(name: str, host: HostComfyUI, groups: RankGroups, method: str, again: bool = False) -> Proof:
    """What is remembered of a class; or its tiny models are compared. All ranks call it alike.

    Args:
        method: proofs.TOKENS, for which there are several ranks, or proofs.PATCHES.
        again: whatever is remembered, unless it is right.

    Raises:
        PlanMismatch: it has no plan.
    """
    plans, attention = candidates(name), chosen_attention()
    known = _proven.get((name, method)) or proofs.read(host, name, attention, method)
    # On several machines each has a file of its own.
    apart = groups.differ("" if known is None else f"{known.plan} of {len(known.tried)}")
    if known is not None and not apart and not (again and known.plan is None):
        _proven[name, method] = known
        return known
    cases = {kind: case for kind, case in CASES.items() if case.name == name}
    tried, sure = [], True
    for plan in plans:
        kinds: dict[str, Kind] = {}
        for kind, case in cases.items():
            try:
                kinds[kind] = _compared(case, plan, groups, method)
            except FailedAlone as failure:
                kinds[kind], sure = Kind(wrong=str(failure)), False
        tried.append(kinds)
        if not proofs.why_not(kinds):
            break
    proof = Proof(name, attention, method, tuple(tried))
    if sure or proof.plan is not None:
        _proven[name, method] = proof
        proofs.remember(host, proof)
    return proof


def proven_plan(name: str, host: HostComfyUI, groups: RankGroups, method: str) -> Plan:
    """The plan of a class that is right on this ComfyUI.

    Raises:
        PlanMismatch: none is.
    """
    proof = prove(name, host, groups, method)
    if proof.plan is None:
        raise PlanMismatch(f"its plan is not right for this ComfyUI's {name} ({proof.why})")
    return candidates(name)[proof.plan]


def chosen_attention() -> str:
    """The name of the function that ComfyUI attends with."""
    chosen = comfy.ldm.modules.attention.optimized_attention
    return getattr(chosen, "original", chosen).__name__


# ---------------------------------------------------------------------- one kind of call


def _compared(case: Case, plan: Plan, groups: RankGroups, method: str) -> Kind:
    """Raises FailedAlone."""
    device = groups.device

    def alone() -> tuple[nn.Module, list[torch.Tensor]]:
        model, _ = tiny_model(case, device)
        return model, _call(model, case, device)

    built, why = _on_all(groups, alone)
    if built is None:
        return Kind(unbuilt=why)
    if method == proofs.PATCHES:
        return _compared_in_patches(case, plan, groups)
    model, wanted = built
    errors = []
    for deaf in (False, True):
        error, why = _on_all(groups, lambda deaf=deaf: _difference(model, case, plan, groups, wanted, deaf))
        if error is None:
            return Kind(wrong=why)
        errors.append(error)
    error, deaf = errors
    wrong = ""
    if groups.any(not error <= SAME or not deaf >= OTHER):
        wrong = f"off by {error:.0e}, and by {deaf:.0e} without other ranks' keys"
    return Kind(error, deaf, wrong)


def _compared_in_patches(case: Case, plan: Plan, groups: RankGroups) -> Kind:
    """Raises FailedAlone."""
    if traits_of(case.name).forget:
        return Kind(wrong="it keeps keys from call to call, and a patch would not know whose they are")
    found, why = _on_all(groups, lambda: difference_in_patches(case, plan, groups.device))
    if found is None:
        return Kind(wrong=why)
    whole, patches, stale = found
    wrong = ""
    if groups.any(not whole <= SAME or not patches <= SAME):
        wrong = f"off by {whole:.0e} as a whole, and by {patches:.0e} in patches"
    elif groups.any(not (stale >= OTHER or case.causal)):
        wrong = "patches do not see each other's keys"
    return Kind(max(whole, patches), stale, wrong)


def _on_all(groups: RankGroups, do: Callable[[], Result]) -> tuple[Result | None, str]:
    """What `do` returns; or nothing, and what it raised here, as it did on all ranks.

    Raises:
        FailedAlone: it failed on some ranks only, or for want of memory, on all ranks alike.
    """
    result, failure, transient = None, None, False
    try:
        result = do()
    except MemoryError as error:
        failure, transient = error, True
    except FAILURES as error:
        failure = error
        transient = isinstance(error, OutOfStep) or any(word in str(error).lower() for word in NO_MEMORY)
    failed, fine, transient = (groups.any(flag) for flag in (failure is not None, failure is None, transient))
    if transient or (failed and fine):
        said = _words(failure) or "another rank refused"
        raise FailedAlone(f"{said} (on some ranks only, or for want of memory; the next load tries again)")
    return result, _words(failure)


def _words(failure: BaseException | None) -> str:
    return "" if failure is None else f"{type(failure).__name__}: {failure}"


def _difference(
    model: nn.Module, case: Case, plan: Plan, groups: RankGroups, wanted: list[torch.Tensor], deaf: bool
) -> float:
    mesh = Lockstep.of(groups.mesh, groups.differ)
    spread: Spread | None = None
    try:
        with mesh.together():
            spread = Spread(model, plan, mesh, deaf=deaf)
            got = _call(model, case, groups.device, spread)
    finally:
        if spread is not None:
            spread.close()
    return max(float((g - w).norm() / w.norm()) for g, w in zip(got, wanted, strict=True))


def _call(
    model: nn.Module, case: Case, device: torch.device, spread: Spread | None = None
) -> list[torch.Tensor]:
    args, kwargs = given(case, Draw(case.batches[0]), device)
    if spread is not None and "control" in kwargs:
        kwargs["control"] = spread.residuals(kwargs["control"])
    return case.outputs(model, *args, **kwargs)
