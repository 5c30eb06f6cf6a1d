"""docs/gpu.md: from what was measured on a named device, or from nothing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TEMPLATE = Path(__file__).with_name("gpu.template.md")
GIB = 1 << 30
NOT_YET = "**Not yet run on a GPU.**"


def page(results: dict[str, Any] | None, log: str | None) -> str:
    """The page.

    Args:
        results: as `python -m benchmarks.gpu` writes them; None where there are none.
        log: what `make test-gpu` printed; None where it was not run.
    """
    return TEMPLATE.read_text().format(tests=_tests(log), bench=_bench(results))


def _tests(log: str | None) -> str:
    if log is None:
        return NOT_YET
    lines = [line for line in log.splitlines() if re.search(r"\d+ (passed|failed|error)", line)]
    if not lines:
        return "**Ended before pytest could say how many tests passed.**"
    found = re.search(r"^device: (.*)$", log, re.MULTILINE)
    failed = [f"* `{line}`" for line in log.splitlines() if line.startswith(("FAILED", "ERROR"))]
    device = found[1] if found else "a device that did not say its name"
    return "\n".join([f"On {device}: {lines[-1].strip('= ')}", *failed])


def _bench(results: dict[str, Any] | None) -> str:
    if results is None:
        return NOT_YET
    head = (
        "model", "call", "plain diffusers, s", "with the seam", "one rank, s", "plain / rank",
        "bridge, ms", "load, s", "weights, GiB", "beside them, GiB", "difference",
    )  # fmt: skip
    lines = [head, ["---"] * len(head), *(_cells(row) for row in results["rows"])]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"On {results['device']}, {results['turns']} turns, torch {results['torch']}.\n\n{table}"


def _cells(row: dict[str, Any]) -> Sequence[str]:
    def said(name: str, form: str, factor: float = 1.0) -> str:
        return "" if row[name] is None else format(row[name] * factor, form)

    return (
        row["name"], row["words"], said("plain", ".4f"), said("seam", ".3f"), said("rank", ".4f"),
        said("ratio", ".3f"), said("bridge", ".2f", 1000), said("load", ".1f"), said("bytes", ".1f", 1 / GIB),
        said("peak", ".2f", 1 / GIB), said("difference", ".1e"),
    )  # fmt: skip
