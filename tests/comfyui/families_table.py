"""docs/comfyui-families.md: what `make test-comfyui` measured of every class, on every version it ran on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

COLUMNS = (
    "1 rank, fp32", "1 rank, bf16", "CFG 2", "sharded 2",
    "ulysses 2", "ring 2", "ulysses 2 x ring 2", "deaf",
)  # fmt: skip
ABSENT = "not in this ComfyUI"
INTRODUCTION = """\
# ComfyUI's own classes in the ranks, measured

Written by `make test-comfyui COMFYUI_DIR=...`: tiny random models of every transformer class of that ComfyUI,
one row per kind of call, against stock ComfyUI in one process. Relative L2 of one call: the worst of batches
of one and two rows, odd numbers of image and text tokens.

* **1 rank**: "equal" is bit for bit, in fp32 and in bf16, through XDiTLoadDiffusionModel and the real file.
* **CFG 2, sharded 2**: two ranks, through the same node. **Ulysses 2, Ring 2, both**: two and four ranks.
* **deaf**: the same with the other ranks' keys left out. Above 1e-4, or the figures beside it would mean
  nothing.

Bounds in the tests: 1e-5. Two CPU cores, gloo, torch 2.13.0.
"""
Cell = float | str
Rows = dict[str, dict[str, Cell]]  # case -> column -> relative L2, or why there is none


class FamiliesTable:
    """Of one version of ComfyUI, filled by tests in any order."""

    def __init__(self, version: str):
        self.version, self.rows = version, Rows()

    def record(self, case: str, column: str, cell: Cell) -> None:
        """The worst of what is said of a cell counts."""
        row = self.rows.setdefault(case, {})
        before = row.get(column)
        if isinstance(before, float) and isinstance(cell, float):
            cell = max(before, cell)
        row[column] = before if isinstance(before, str) else cell

    def is_whole(self, cases: list[str]) -> bool:
        """Whether every cell has been filled, as after a run of all tests."""
        rows = (self.rows.get(case, {}) for case in cases)
        return all(ABSENT in row.values() or set(row) >= set(COLUMNS) for row in rows)

    def write(self, page: Path) -> None:
        """The page, with what it says of other versions, and its numbers beside it as JSON."""
        numbers = page.with_suffix(".json")
        versions: dict[str, Rows] = json.loads(numbers.read_text()) if numbers.exists() else {}
        versions[self.version] = {
            case: {c: row.get(c, ABSENT) for c in COLUMNS} for case, row in self.rows.items()
        }
        numbers.write_text(json.dumps(versions, indent=1) + "\n")
        page.write_text("\n".join(_lines(versions)) + "\n")


def _lines(versions: dict[str, Rows]) -> Iterator[str]:
    yield INTRODUCTION.rstrip()
    for version, rows in sorted(versions.items(), key=lambda item: [int(n) for n in item[0].split(".")]):
        yield from ("", f"## ComfyUI {version}", "")
        yield f"| kind of call | {' | '.join(COLUMNS)} |"
        yield f"|---|{'---|' * len(COLUMNS)}"
        reasons: dict[str, None] = {}
        absent = [case for case, row in rows.items() if ABSENT in row.values()]
        for case, row in rows.items():
            if case not in absent:
                yield f"| {case} | {' | '.join(_cell(row[c], c, reasons) for c in COLUMNS)} |"
        if reasons:
            yield ""
        yield from (f"{number}. {reason}" for number, reason in enumerate(reasons, 1))
        if absent:
            yield from ("", f"Not in this version: {', '.join(absent)}.")


def _cell(value: Cell, column: str, reasons: dict[str, None]) -> str:
    if isinstance(value, str):
        reasons.setdefault(value)
        return f"({list(reasons).index(value) + 1})"
    return "equal" if value == 0 and column.startswith("1 rank") else f"{value:.0e}" if value else "0"
