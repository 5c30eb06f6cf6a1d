"""docs/comfyui.md's tables: every sampler with every scheduler, measured by tests/comfyui/test_samplers.py.

Run `make test-comfyui COMFYUI_DIR=...` for each version of ComfyUI first; it leaves output/samplers.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MARKS = ("<!-- measured -->", "<!-- end -->")
Results = dict[str, dict[str, list[list[Any]]]]  # version -> "family layout" -> [sampler, scheduler, cfg, d]


def tables(results: Results) -> Iterator[str]:
    """Lines of Markdown."""
    worst: dict[tuple[str, str], float] = defaultdict(float)
    for rows in results.values():
        for cells in rows.values():
            for sampler, scheduler, _, difference in cells:
                worst[sampler, scheduler] = max(worst[sampler, scheduler], difference)
    yield from _by_layout(results)
    samplers, schedulers = (list(dict.fromkeys(names)) for names in zip(*worst, strict=True))
    yield ""
    yield "The worst of all versions, families, layouts and CFG values, by sampler and scheduler:"
    yield ""
    yield f"| sampler | {' | '.join(schedulers)} |"
    yield f"|---|{'---|' * len(schedulers)}"
    for sampler in samplers:
        # A version without this pair has no number for it.
        numbers = (f"{worst[sampler, s]:.0e}" if (sampler, s) in worst else "" for s in schedulers)
        yield f"| {sampler} | {' | '.join(numbers)} |"


def _by_layout(results: Results) -> Iterator[str]:
    yield "| ComfyUI | model and ranks | runs | median | worst | by |"
    yield "|---|---|---|---|---|---|"
    for version, rows in results.items():
        for name, cells in rows.items():
            sampler, scheduler, cfg, highest = max(cells, key=lambda cell: cell[3])
            median = statistics.median(cell[3] for cell in cells)
            yield (
                f"| {version} | {name} | {len(cells)} | {median:.1e} | {highest:.1e} "
                f"| {sampler}, {scheduler}, CFG {cfg:g} |"
            )


def main() -> None:
    """Put the tables into the page, between the marks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measured", type=Path, default=Path("output/samplers.json"))
    parser.add_argument("--page", type=Path, default=Path("docs/comfyui.md"))
    arguments = parser.parse_args()
    page = arguments.page.read_text()
    begin, end = (page.index(mark) for mark in MARKS)
    lines = "\n".join(tables(json.loads(arguments.measured.read_text())))
    arguments.page.write_text(f"{page[: begin + len(MARKS[0])]}\n\n{lines}\n\n{page[end:]}")


if __name__ == "__main__":
    main()
