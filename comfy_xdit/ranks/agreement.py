"""What the answers of several ranks to one message amount to."""

from __future__ import annotations

from typing import Any

from comfy_xdit.protocol.messages import Failure

# What a rank says when another one went away: the consequence, never the cause.
_CONSEQUENCES = (
    "connection closed by peer", "connection reset", "broken pipe", "timed out", "socket",
    "another rank refused",
)  # fmt: skip


def agree(replies: dict[int, Any], ranks: list[int]) -> bool:
    """True when every rank answered and all answers are of one kind, at one step."""
    if len(replies) < len(ranks):
        return False
    kinds = {
        (type(m), m.kind) if isinstance(m, Failure) else (type(m), getattr(m, "step", None))
        for m in replies.values()
    }
    return len(kinds) == 1


def is_consequence(failure: Failure) -> bool:
    """True when the rank failed because another one went away."""
    return any(word in failure.message.lower() for word in _CONSEQUENCES)
