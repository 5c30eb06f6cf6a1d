"""How fast a rank reads weights: a file in the page cache through worker/checkpoints.py, per CPU second.

`python -m benchmarks.users.reading` adds a run to docs/users.json, of which `make simulate-users` takes the
slowest. On CPU: measured is the copy that a rank makes of its own; to a GPU it takes the same way and more.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.faults.page import machine
from benchmarks.users.studies import FILE, measured
from worker.checkpoints import Checkpoint, Source

TENSORS, ELEMENTS = 8, 8 << 20  # 128 MiB in bf16
TURNS = 5


def rate(path: Path) -> float:
    """Bytes per second of CPU time, of the fastest of TURNS readings: on a busy machine a clock says less."""
    checkpoint = Checkpoint.at(path)
    mapping = {name: Source(name) for name in checkpoint.shapes}
    taken = []
    for _ in range(TURNS):
        began = time.process_time()
        read = checkpoint.tensors(mapping, torch.bfloat16, torch.device("cpu"))
        taken.append(time.process_time() - began)
        del read
    return TENSORS * ELEMENTS * 2 / min(taken)


def main() -> None:
    """Measure, print and write."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.safetensors"
        save_file({f"w{i}": torch.zeros(ELEMENTS, dtype=torch.bfloat16) for i in range(TENSORS)}, path)
        found = rate(path)
    before = measured()["bytes_per_second"] if FILE.exists() else []
    result = {"bytes_per_second": [*before, found], "machine": machine(), "date": time.strftime("%d %B %Y")}
    print(json.dumps(result, indent=1))
    FILE.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
