"""Which of ComfyUI's classes were proven to give the same picture with their tokens spread over ranks.

The ranks prove and write; they and the host read. A proof counts for the code it was made with: ComfyUI's
version and the files of its models, this pack's ranks and their plans, torch, and the attention that ComfyUI
chose. A custom build that keeps its version number is another one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from comfy_xdit.protocol import remembered
from comfy_xdit.protocol.spec import HostComfyUI

NAME = "proofs.json"
TOKENS, PATCHES = "tokens", "patches"  # what is proven: Ulysses and Ring, or PipeFusion
KEPT = 1000  # proofs; the oldest go first
RANKS = Path(__file__).parents[2] / "worker"
UNPROVEN = (
    "it is not proven yet that this ComfyUI's class gives the same picture on several ranks; `python "
    "-m comfy_xdit doctor --families --prove` does it, and so does the first load that would spread it"
)


@dataclass(frozen=True)
class Kind:
    """What came of one kind of call of one plan, on a tiny model in fp32.

    Args:
        error: relative L2 of all ranks, or stages, to one; None where nothing was compared.
        deaf: the same with the other ranks' keys left out, or another call's, which must differ.
        wrong: why the plan is not right; "" is right, or not compared.
        unbuilt: why this ComfyUI has, or computes, no such call on one rank.
    """

    error: float | None = None
    deaf: float | None = None
    wrong: str = ""
    unbuilt: str = ""


Kinds = Mapping[str, Kind]


@dataclass(frozen=True)
class Proof:
    """Of one class: each of its plans in turn, until one was right with every kind of call.

    Args:
        name: ComfyUI's name of the class.
        attention: the function that ComfyUI chose, by its name.
        method: TOKENS or PATCHES.
        tried: of every plan that was tried, what came of each kind of call.
    """

    name: str
    attention: str
    method: str
    tried: tuple[Kinds, ...]

    @property
    def plan(self) -> int | None:
        """Which plan is right."""
        return len(self.tried) - 1 if self.tried and not why_not(self.tried[-1]) else None

    @property
    def why(self) -> str:
        """Why none is; "" where one is."""
        if self.plan is not None:
            return ""
        reasons = [why_not(kinds) for kinds in self.tried]
        return (
            reasons[0]
            if len(reasons) == 1
            else "; ".join(f"plan {i + 1}: {r}" for i, r in enumerate(reasons))
        )

    def plain(self) -> dict[str, Any]:
        """For JSON, and for the bridge."""
        tried = [{kind: asdict(outcome) for kind, outcome in kinds.items()} for kinds in self.tried]
        return {"name": self.name, "attention": self.attention, "method": self.method, "tried": tried}

    @classmethod
    def of(cls, plain: Any) -> Proof:
        """From its plain form.

        Raises:
            ValueError: it is none.
        """
        try:
            tried = [{k: Kind(**o) for k, o in kinds.items()} for kinds in plain["tried"]]
            return cls(*(str(plain[key]) for key in ("name", "attention", "method")), tuple(tried))
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"no proof of a class ({error!r})") from error


def why_not(kinds: Kinds) -> str:
    """Why a plan is not right; "" is right.

    One kind of call that is wrong makes the class wrong: a call does not say of which kind it is. One that
    this ComfyUI does not build does not, as long as another was compared.
    """
    for kind, outcome in kinds.items():
        if outcome.wrong:
            return f"{kind}: {outcome.wrong}"
    if any(outcome.error is not None for outcome in kinds.values()):
        return ""
    unbuilt = "; ".join(f"{kind}: {outcome.unbuilt}" for kind, outcome in kinds.items())
    return f"there is no tiny model to prove it on{unbuilt and f' ({unbuilt})'}"


def known(host: HostComfyUI) -> Iterator[Proof]:
    """All that counts for this ComfyUI."""
    mark = digest(host)
    for key, plain in remembered.read(NAME, _check).items():
        if key.split()[1] == mark:
            yield Proof.of(plain)


def read(host: HostComfyUI, name: str, attention: str, method: str) -> Proof | None:
    """Of one class with one attention."""
    asked = (name, attention, method)
    return next((p for p in known(host) if (p.name, p.attention, p.method) == asked), None)


def remember(host: HostComfyUI, proof: Proof) -> None:
    """Keep a proof, in place of an earlier one."""
    key, plain = f"{proof.name} {digest(host)} {proof.attention} {proof.method}", proof.plain()

    def change(held: dict[str, Any]) -> bool:
        before = held.pop(key, None)
        held[key] = plain | {"comfyui": host.version, "torch": torch.__version__}
        for oldest in list(held)[:-KEPT]:
            del held[oldest]
        return before != held[key]

    remembered.update(NAME, _check, change)


def why_not_spread(host: HostComfyUI, name: str) -> str:
    """Why tokens of a class with a plan are not spread in this ComfyUI, as far as is known; "" is spread."""
    found = [proof for proof in known(host) if (proof.name, proof.method) == (name, TOKENS)]
    return next((proof.why for proof in found if proof.why), "") if found else UNPROVEN


@lru_cache
def digest(host: HostComfyUI) -> str:
    """Of the code that a proof is of. Once per process: it runs what it found when it began."""
    result = hashlib.sha256(f"{host.version} {torch.__version__}".encode())
    for folder in (Path(host.root) / "comfy" / "ldm", RANKS):
        for file in sorted(folder.rglob("*.py")):
            result.update(f"\n{file.relative_to(folder)}\n".encode())
            result.update(file.read_bytes())
    return result.hexdigest()[:16]


def _check(held: Any) -> None:
    """Raise ValueError for what holds something that is no proof."""
    try:
        for key, plain in held.items():
            name, _, *kind = key.split()
            if (name, kind) != (plain["name"], [plain["attention"], plain["method"]]):
                raise ValueError(f"{key!r} is that of {plain['name']!r}")
            Proof.of(plain)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"not a table of proofs ({error!r})") from error
