"""`make faults`: every fault in turn, a table, docs/reliability.md; exit code 1 if any is missed."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

os.environ["XDIT_OMP_NUM_THREADS"] = "1"

import torch

from benchmarks.faults import (
    in_ranks,
    of_files,
    of_hosts,
    of_the_machine,
    of_the_template,
    on_the_bridge,
    page,
    plan,
)
from benchmarks.faults.jobs import write_models
from benchmarks.faults.scene import Fault, Scene, is_ours

FAULTS = (
    *in_ranks.FAULTS, *on_the_bridge.FAULTS, *of_files.FAULTS, *of_the_machine.FAULTS, *of_hosts.FAULTS,
    *of_the_template.FAULTS,  # after two failures no rank is forked any more
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """What came of one fault. `misses` is empty where everything was as it must be."""

    kind: str
    name: str
    words: str
    seconds: float
    bound: float
    slowness: float
    misses: tuple[str, ...]


def one(fault: Fault, scene: Scene) -> Row:
    """Let a fault happen, and look at everything it may have done."""
    before, pids = scene.inventory(), scene.group.pids
    slow = scene.slowness
    seen = fault.inject(scene)
    kept = scene.group.pids == pids
    misses = scene.next_job()
    slow = max(slow, scene.slowness)
    words = "" if seen.error is None else str(seen.error)
    if seen.error is not None and not is_ours(seen.error):
        misses.append(f"not an error of ours: {seen.error!r}")
    elif fault.says is None and seen.error is not None:
        misses.append(f"an error where none is due: {words}")
    elif fault.says is not None and not re.search(fault.says, words):
        misses.append(f"the error does not say {fault.says!r}:\n{words}" if words else "no error")
    if seen.seconds > fault.bound * slow:
        misses.append(f"{seen.seconds:.1f} s, at most {fault.bound * slow:.1f}")
    if fault.keeps and not kept:
        misses.append("the ranks did not stay")
    misses += scene.left(before)
    return Row(fault.kind, fault.name, words, seen.seconds, fault.bound, slow, tuple(misses))


def run(faults: list[Fault], folder: Path) -> list[Row]:
    """All of them on one scene."""
    write_models(folder)
    scene = Scene(folder)
    rows = []
    try:
        scene.next_job()
        for fault in faults:
            row = one(fault, scene)
            rows.append(row)
            mark = "MISSED" if row.misses else "ok"
            print(f"{row.seconds:6.2f} s of {row.bound:4.1f} x {row.slowness:.1f}  {mark:6} ", end="")
            print(f"{row.kind}: {row.name}", *row.misses, sep="\n        " if row.misses else "", flush=True)
    finally:
        scene.close()
    return rows


def main() -> None:
    """Inject, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="a pattern for 'kind: name'; the page is not written")
    arguments = parser.parse_args()
    wanted = [f for f in FAULTS if re.search(arguments.only, f"{f.kind}: {f.name}")]
    torch.set_num_threads(1)
    began, load = time.monotonic(), os.getloadavg()[0]
    root = Path(tempfile.mkdtemp(prefix="comfy_xdit_faults_"))
    try:
        folders = [root / name for name in ("models", "plan", "temporary")]
        for folder in folders:
            folder.mkdir()
        os.environ[plan.FOLDER], os.environ["TMPDIR"] = map(str, folders[1:])
        tempfile.tempdir = None
        rows = run(wanted, folders[0])
    finally:
        shutil.rmtree(root)
    missed = [row for row in rows if row.misses]
    seconds = time.monotonic() - began
    print(f"{len(rows)} faults in {seconds:.0f} s, {len(missed)} missed")
    if not arguments.only:
        short = [
            asdict(replace(row, words=page.short(row.words), misses=tuple(map(page.short, row.misses))))
            for row in rows
        ]
        page.write("faults", {"rows": short, "seconds": seconds, "load": load})
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
