"""Why `auto` chose a layout, in words."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from comfy_xdit.planning.auto import chosen_for, classes_for
from comfy_xdit.planning.planner import figure, short
from comfy_xdit.planning.request import DEFAULT_PIXELS
from comfy_xdit.protocol.parallel import ParallelConfig

CANDIDATES = 4  # of a plan that are shown


def reasons(layout: ParallelConfig) -> Iterator[str]:
    """Why `auto` chose the layout, and what it left."""
    chosen, classes = chosen_for(layout), classes_for(layout)
    for path, why in classes:
        yield f"  plan for {Path(path).name} (auto): {why}"
    if not chosen and not classes:
        yield "  plan: chosen by hand (strategy manual)"
    for path, choice in chosen:
        yield f"  plan for {Path(path).name} at {DEFAULT_PIXELS} x {DEFAULT_PIXELS} (auto): {choice.plan.why}"
        now = choice.again()
        words = [
            f"{short(c)} {figure(1000 * c.prediction.seconds)} ms"
            + (f" (measured {figure(1000 * c.measured)})" if c.measured is not None else "")
            for c in now.ranked[:CANDIDATES]
        ]
        yield f"    predicted per step: {'; '.join(words)}"
        if now.pick.layout != choice.plan.pick.layout:
            yield f"    after the next start: {short(now.pick)}, by the times measured since"
