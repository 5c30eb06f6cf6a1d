"""`doctor --families`: which of a ComfyUI's classes are proven to run on several ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from comfy_xdit.protocol import proofs
from comfy_xdit.protocol.errors import InvalidInput, XDiTError
from comfy_xdit.protocol.messages import Prove
from comfy_xdit.protocol.parallel import ParallelConfig, available_devices
from comfy_xdit.protocol.proofs import Kind, Proof
from comfy_xdit.protocol.spec import HostComfyUI
from comfy_xdit.ranks.group import WorkerGroup

RANKS = 2
METHODS = {proofs.TOKENS: "Ulysses and Ring", proofs.PATCHES: "PipeFusion"}


def lines(host: HostComfyUI, prove: Sequence[str] | None = None) -> Iterator[str]:
    """A line for each kind of call of each class.

    Args:
        host: the ComfyUI.
        prove: these classes, or without a name all, as far as they are not proven, on two ranks; None shows
            what is remembered, and starts nothing.

    Raises:
        InvalidInput: a class has no plan.
    """
    yield f"ComfyUI {host.version} in {host.root}: relative L2 of {RANKS} ranks to one, tiny models in fp32"
    if prove is not None:
        yield from _proven_now(host, prove)
        return
    found = sorted(
        proofs.known(host), key=lambda proof: (proof.name, proof.attention, proof.method != proofs.TOKENS)
    )
    for proof in found:
        yield from rows(proof)
    if not found:
        yield "nothing is proven yet"
    yield "A class is proven when its tokens are first to be spread; all now: --prove"


def rows(proof: Proof) -> Iterator[str]:
    """Of one class: what came of it, and of every kind of call of the plan that was tried last."""
    what = "yes" if proof.plan is not None else f"no: {proof.why}"
    yield f"{proof.name} ({proof.attention}), {METHODS[proof.method]}: {what}"
    for kind, outcome in (proof.tried[-1] if proof.tried else {}).items():
        yield f"  {kind:<24}{_words(outcome)}"


def _words(outcome: Kind) -> str:
    if outcome.wrong:
        return f"wrong: {outcome.wrong}"
    if outcome.error is None:
        return f"not in this ComfyUI: {outcome.unbuilt}"
    return f"proven: {outcome.error:.0e} ({outcome.deaf:.0e} without the others' keys)"


def _proven_now(host: HostComfyUI, names: Sequence[str]) -> Iterator[str]:
    devices = () if len(available_devices()) >= RANKS else ("cpu",) * RANKS
    group = WorkerGroup(ParallelConfig(ulysses_degree=RANKS, devices=devices))
    try:
        planned = group.call(Prove(host)).value
        if unknown := [name for name in names if name not in planned]:
            raise InvalidInput(
                f"there is no plan for {', '.join(unknown)}; choose among {', '.join(planned)}."
            )
        for name in names or planned:
            try:
                for proof in group.call(Prove(host, name)).value:
                    yield from rows(Proof.of(proof))
            except XDiTError as error:  # a class that ends the ranks does not hide the others
                yield f"{name}: {str(error).splitlines()[0]}"
    finally:
        group.close()
