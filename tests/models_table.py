"""docs/models.md: what the tests measured of every model of diffusers folders, against plain diffusers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

CALLS = ("1 rank", "CFG 2", "data 2", "Ulysses 2", "Ring 2", "Ulysses 2, sharded", "PipeFusion 2")
INTRODUCTION = """\
# Models of diffusers folders, measured

Written by `make models` and `make test-comfyui`: tiny random models in folders as diffusers leaves them,
against plain diffusers in one process, called as its own pipelines call it. fp32, two CPU cores, gloo.

* **A call**: relative L2 of one call of the transformer, two rows with times of their own, masked prompts
  where the class takes masks. Bound in the tests: 1e-5. PipeFusion: of a run of three steps, all of them
  warm-up, against one rank.
* **A run**: relative L2 of the latent after eight steps of the stock `euler` in that ComfyUI, guided,
  against diffusers' own scheduler of the same formula (Euler for flows, DDIM for tables). Bound: 1e-4.
  Where a table ends in noise alone, ComfyUI's ends in a signal of 4.9e-8, and diffusers' is given that
  (without it: up to 1.2e-4).
"""
Cell = float | str


class ModelsTable:
    """Filled by tests in any order; what was measured before, and not now, stays."""

    def __init__(self) -> None:
        self._rows: dict[str, dict[str, Cell]] = {}

    def record(self, model: str, column: str, cell: Cell) -> None:
        """A number, or why there is none."""
        self._rows.setdefault(model, {})[column] = cell

    def write(self, page: Path) -> None:
        """The page, and its numbers beside it as JSON."""
        numbers = page.with_suffix(".json")
        known: dict[str, dict[str, Cell]] = json.loads(numbers.read_text()) if numbers.exists() else {}
        for model, row in self._rows.items():
            known[model] = known.get(model, {}) | row
        numbers.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
        page.write_text("\n".join(_lines(known)) + "\n")


def _lines(known: dict[str, dict[str, Cell]]) -> Iterator[str]:
    yield INTRODUCTION.rstrip()
    reasons: dict[str, None] = {}
    runs = sorted({column for row in known.values() for column in row} - set(CALLS))
    for title, columns in (("A call", CALLS), ("A run", tuple(runs))):
        yield from (
            "",
            f"## {title}",
            "",
            f"| model | {' | '.join(columns)} |",
            f"|---|{'---|' * len(columns)}",
        )
        for model, row in sorted(known.items()):
            yield f"| {model} | {' | '.join(_cell(row.get(column), reasons) for column in columns)} |"
    yield ""
    yield from (f"{number}. {reason}" for number, reason in enumerate(reasons, 1))


def _cell(value: Cell | None, reasons: dict[str, None]) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        reasons.setdefault(value)
        return f"({list(reasons).index(value) + 1})"
    return f"{value:.0e}" if value else "0"
