"""Ranks that a test starts without a worker group: programs that meet at a file and compute apart."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def found_by_ranks(module: str, world: int, seconds: float, *more: str) -> Any:
    """What rank 0 says, as JSON on its last line, of `world` processes of `python -m module RANK FILE *more`.

    They are gone behind it.

    Raises:
        AssertionError: a rank failed, and what all said last.
        subprocess.TimeoutExpired: they took longer than `seconds`.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        command = [sys.executable, "-W", "ignore", "-m", module]
        ranks = [
            subprocess.Popen(
                [*command, str(rank), f"{folder}/store", *more],
                cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for rank in range(world)
        ]  # fmt: skip
        try:
            outputs = [rank.communicate(timeout=seconds) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
    assert [rank.returncode for rank in ranks] == [0] * world, "\n".join(out[1][-1500:] for out in outputs)
    return json.loads(outputs[0][0].splitlines()[-1])
