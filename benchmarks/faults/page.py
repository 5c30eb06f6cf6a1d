"""docs/reliability.md, written from what the faults and the soak last gave (docs/reliability.json)."""

from __future__ import annotations

import json
import os
import platform
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

DOCS = Path(__file__).parent.parent.parent / "docs"
RESULTS, PAGE = DOCS / "reliability.json", DOCS / "reliability.md"
TEMPLATE = Path(__file__).parent / "reliability.template.md"
CLIP = 110  # characters of an error in the table
KINDS = {
    "death": "A rank dies",
    "exception": "A rank raises",
    "hang": "A rank hangs",
    "idle": "A rank goes while nothing runs",
    "bridge": "Other programs write to the bridge",
    "file": "A model file changes",
    "machine": "The machine has nothing left",
    "template": "The process that ranks are forked from fails",
    "host": "The host ends (how long its ranks outlive it)",
}


def write(part: str, result: dict[str, Any]) -> None:
    """Note what a program measured, on what machine, and write the page anew."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results[part] = result | {"machine": machine(), "date": time.strftime("%d %B %Y")}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    text = TEMPLATE.read_text()
    for name, words in (("faults", faults), ("soak", soak), ("fuzz", fuzz), ("restarts", restarts)):
        found = "\n".join(words(results[name])) if name in results else "Not measured yet."
        text = text.replace(f"<!-- {name} -->", found)
    PAGE.write_text(text)


def machine() -> str:
    """This machine in words."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    gpu = f"{torch.cuda.device_count()} GPUs" if torch.cuda.is_available() else "no GPU"
    return (
        f"{os.cpu_count()} cores of a {platform.machine()} machine, {memory:.0f} GiB of memory, {gpu}, "
        f"Linux {platform.release().split('-')[0]}, Python {platform.python_version()}, torch "
        f"{torch.__version__}"
    )


def faults(result: dict[str, Any]) -> Iterator[str]:
    """The tables of faults."""
    rows = result["rows"]
    missed = sum(bool(row["misses"]) for row in rows)
    slowest = max(row["slowness"] for row in rows)
    yield (
        f"{len(rows)} faults in {result['seconds'] / 60:.0f} minutes on {result['date']}, {missed} missed. "
        f"{result['machine']}; load average {result['load']:.1f} at the beginning. A loop without a fault "
        f"took up to {slowest:.1f} times the fastest of the beginning; bounds were multiplied by that, fault "
        "by fault."
    )
    for kind, title in KINDS.items():
        yield from (
            "",
            f"### {title}",
            "",
            "| fault | what the caller sees | s | bound | held |",
            "|---|---|---|---|---|",
        )
        for row in (row for row in rows if row["kind"] == kind):
            bound = f"{row['bound']:.0f}" + (f" x {row['slowness']:.1f}" if row["slowness"] > 1.05 else "")
            held = "; ".join(row["misses"]) or "yes"
            words = row["words"] or "nothing: the run goes on and is right"
            yield f"| {row['name']} | {words} | {row['seconds']:.2f} | {bound} | {held} |"


def soak(result: dict[str, Any]) -> Iterator[str]:
    """What the soak counted, and the slopes."""
    yield f"{result['words']} {result['machine']}; {result['date']}."
    yield from ("", "| | least | most | slope per 100 runs |", "|---|---|---|---|")
    for name, row in result["slopes"].items():
        yield f"| {name} | {row['least']:.6g} | {row['most']:.6g} | {row['slope']:+.3g} |"


def fuzz(result: dict[str, Any]) -> Iterator[str]:
    """What was sent and read."""
    yield from (f"- {line}" for line in result["lines"])
    yield from ("", f"No crash, no hang, no exception but ours. {result['machine']}; {result['date']}.")


def restarts(result: dict[str, Any]) -> Iterator[str]:
    """What every start and end of a server left."""
    yield f"{result['words']} {result['machine']}; {result['date']}."
    yield from ("", "| how it ended | times | ready s | gone s, at most | left |", "|---|---|---|---|---|")
    for row in result["rows"]:
        yield (
            f"| {row['how']} | {row['times']} | {row['ready']:.0f} | {row['gone']:.1f} | "
            f"{'; '.join(row['left']) or 'nothing'} |"
        )


def short(words: str) -> str:
    """The first line of an error without what differs from run to run."""
    line = re.sub(r"pid \d+", "pid …", words.strip().split("\n")[0]).replace("|", "/")
    line = re.sub(r"/\S+/", "", line)
    return line if len(line) <= CLIP else f"{line[:CLIP]} …"
