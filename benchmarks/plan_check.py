"""Does the planner ever pick a layout that is slower than one rank? `python -m benchmarks.plan_check FILE`.

FILE is JSON: a list of rows, or an object with them under "rows". A row is
    {"family": "flux", "tokens": 4096, "layout": "Ulysses 2", "seconds": 1.2}
with the image tokens of a picture and the seconds of a step, measured on CPU ranks of one thread.
Optional: "cfg" (a guided step, false) and "batch" (1), which rows must share to be compared, and
"shape", the fields of a ModelShape where the model was not the published one of that family.

The pick is checked twice: as predicted, and with the table as remembered times. A pick that the table
lacks is replaced by the best candidate that it has.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

from comfy_xdit.planning import cluster, planner
from comfy_xdit.planning.measured import Measured
from comfy_xdit.planning.published import PUBLISHED
from comfy_xdit.planning.request import Request
from comfy_xdit.protocol.parallel import ParallelConfig

SLOWER = 1.05
MEMORY = 1 << 40  # the table was measured, so it fitted
_METHODS = {
    "data": "data_parallel_degree",
    "cfg": "cfg_parallel_degree",
    "ulysses": "ulysses_degree",
    "ring": "ring_degree",
    "pipefusion": "pipefusion_degree",
}
Table = dict[ParallelConfig, float]


def read_layout(text: str) -> ParallelConfig:
    """`Ulysses 2 x Ring 2`, `CFG 2`, `data 2`, `1 rank` or `one rank`.

    Raises:
        ValueError: another word is in it.
    """
    if re.fullmatch(r"(1|one) rank", text.strip().lower()):
        return ParallelConfig()
    degrees = {}
    for factor in text.lower().split(" x "):
        found = re.fullmatch(r"([a-z]+) ?(\d+)", factor.strip())
        if found is None or found[1] not in _METHODS:
            raise ValueError(f"{text!r} is no layout; write 'Ulysses 2 x Ring 2' or '1 rank'")
        degrees[_METHODS[found[1]]] = int(found[2])
    return ParallelConfig(**degrees)


def tables(rows: list[dict[str, Any]]) -> dict[Request, Table]:
    """The rows by request."""
    result: dict[Request, Table] = defaultdict(dict)
    for row in rows:
        shape = replace(PUBLISHED[row["family"]], **row.get("shape", {}))
        request = Request(
            shape, row["tokens"], 0, cfg=row.get("cfg", False), batch=row.get("batch", 1), dtype_bytes=4
        )
        result[request][read_layout(row["layout"])] = row["seconds"]
    return result


def picks(request: Request, table: Table) -> dict[str, ParallelConfig]:
    """What the planner takes of the table, as predicted and when it remembers it."""
    where = cluster.of_cpu(max(layout.world_size for layout in table), MEMORY)
    remembered = Measured()
    for layout, seconds in table.items():
        remembered = remembered.with_time(layout, request, where, seconds)
    result = {}
    for name, known in (("predicted", Measured()), ("measured", remembered)):
        plan = planner.plan(request, where, known)
        order = [plan.pick, *plan.ranked]
        result[name] = next(c.layout for c in order if c.layout in table)
    return result


def failures(rows: list[dict[str, Any]]) -> list[str]:
    """A sentence per pick that takes more than SLOWER times one rank."""
    found = []
    for request, table in tables(rows).items():
        one = table.get(ParallelConfig())
        if one is None:
            found.append(f"{request.shape.family}, {request.image_tokens} tokens: no row for one rank")
            continue
        for basis, layout in picks(request, table).items():
            ratio = table[layout] / one
            line = (
                f"{request.shape.family}, {request.image_tokens} tokens, {request.rows} rows: {basis} pick "
                f"{layout.describe()} takes {ratio:.2f} of one rank's time"
            )
            print(line)
            if ratio > SLOWER:
                found.append(line)
    return found


def main() -> int:
    """Print every pick; 1 if one of them is too slow."""
    os.environ.setdefault("XDIT_OMP_NUM_THREADS", "1")
    told = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    found = failures(told["rows"] if isinstance(told, dict) else told)
    for line in found:
        print(f"too slow: {line}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
