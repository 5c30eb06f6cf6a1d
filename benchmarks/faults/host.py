"""A host of its own, which faults may end: it draws once, says so, and does what it is told.

Words come and go over two pipes, whose descriptors and a folder of models are its arguments; its standard
files may be closed.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from benchmarks.faults.jobs import EXPECTED, Jobs, equal
from comfy_xdit.protocol.messages import Progress
from comfy_xdit.protocol.parallel import ParallelConfig
from comfy_xdit.ranks.registry import worker_group

TWO = ParallelConfig(ulysses_degree=2)
FOREVER = 1000


def main() -> None:
    """Draw, report, obey."""
    folder, commands, reports = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    os.set_inheritable(commands, False)
    os.set_inheritable(reports, False)

    def report(**words: Any) -> None:
        os.write(reports, json.dumps(words).encode() + b"\n")

    jobs, group = Jobs(folder), worker_group(TWO)
    drawn = jobs.draw(group)
    report(ranks=group.pids, equal=equal(drawn, torch.load(folder / EXPECTED)))
    command = os.read(commands, 100).decode()
    if command == "":
        return

    def in_mid_run(progress: Progress) -> None:
        if progress.step != 5:
            return
        child = None
        if command == "fork":
            warnings.simplefilter("ignore")  # that threads are lost is what is tested
            child = os.fork()
            if child == 0:
                time.sleep(FOREVER)
                os._exit(0)
        report(running=True, child=child)
        if command == "raise":
            raise ZeroDivisionError
        if command == "exec":  # as ComfyUI-Manager restarts ComfyUI
            os.execv(sys.executable, [sys.executable, "-c", f"import time; time.sleep({FOREVER})"])

    while command != "end":
        jobs.do(group, "Sample", in_mid_run)


if __name__ == "__main__":
    main()
