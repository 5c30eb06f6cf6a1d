"""`make bench-gpu`: measure and write docs/gpu.md.

Usage: python -m benchmarks.gpu [MODEL ...] [--small]      on the machine with the GPU
       python -m benchmarks.gpu --page                     of results that lie in the output folder already
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.measure import give_back, measured
from benchmarks.gpu.page import page
from benchmarks.gpu.shapes import SHAPES

PAGE = Path(__file__).parents[2] / "docs" / "gpu.md"
SECONDS = 480.0  # after which no other model begins: a machine may be lent for ten minutes
TURNS = 12


def main() -> None:
    """Measure, print, write."""
    names = [shape.name for shape in SHAPES]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", help=f"of {', '.join(names)}; none is all")
    parser.add_argument("--small", action="store_true", help="small models, on CPU where there is no GPU")
    parser.add_argument("--page", action="store_true", help="measure nothing")
    parser.add_argument("--output", type=Path, default=Path("output/gpu"), help="folder of results and logs")
    parser.add_argument("--write", type=Path, default=PAGE)
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.models) - set(names)):
        parser.error(f"{', '.join(unknown)} is no model; choose among {', '.join(names)}")
    if not arguments.page:
        if not torch.cuda.is_available() and not arguments.small:
            parser.error("there is no CUDA device; --small measures small models on CPU")
        results = _results(arguments.models or names, arguments.small)
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / "gpu.json").write_text(json.dumps(results, indent=1))
    stored, log = arguments.output / "gpu.json", arguments.output / "test.log"
    text = page(
        json.loads(stored.read_text()) if stored.exists() else None, log.read_text() if log.exists() else None
    )
    arguments.write.write_text(text)
    print(text)


def _results(names: list[str], small: bool) -> dict[str, Any]:
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU, small models"
    began, rows = time.monotonic(), []
    for shape in SHAPES:
        if shape.name not in names:
            continue
        if time.monotonic() - began > SECONDS:
            print(f"{shape.name} was left out: {SECONDS:.0f} s are over")
            continue
        row = measured(shape, device, TURNS, small)
        print(f"{time.monotonic() - began:.0f} s: {row}", flush=True)
        rows.append(asdict(row))
        give_back(device)
    return {"device": name, "torch": torch.__version__, "turns": TURNS, "small": small, "rows": rows}


if __name__ == "__main__":
    main()
