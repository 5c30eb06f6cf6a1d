"""Which cluster this machine is. Never raises: what cannot be found out is taken as slow."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess

from comfy_xdit.planning import cluster
from comfy_xdit.planning.cluster import Cluster, Link

ASK_SECONDS = 5.0
CPU_MEMORY_SHARE = 0.5  # as the ranks use it (worker/store.py)
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def this_machine(devices: tuple[str, ...]) -> Cluster:
    """The cluster that `devices` ("cuda:0", ... or "cpu", ...) are.

    GPUs of several kinds count as so many of the slowest with the least memory: ranks wait for
    each other at every exchange.
    """
    if "cpu" in devices:
        memory = int(CPU_MEMORY_SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        return cluster.of_cpu(min(len(devices), cluster.CPU_RANKS), memory)
    import torch

    numbers = [int(name.removeprefix("cuda:")) for name in devices]
    found = [torch.cuda.get_device_properties(n) for n in numbers]
    kinds = [cluster.gpu(p.name, p.total_memory) for p in found]
    slowest = min(kinds, key=lambda device: device.matmul)
    near, socket = _links(numbers)
    return cluster.linked(slowest, len(devices), near, socket).reduced(min(d.memory for d in kinds))


def _links(numbers: list[int]) -> tuple[Link, int | None]:
    """The link within a socket, and how many devices share one."""
    physical = _physical(numbers)
    text = _topology()
    kinds = parse_topology(text) if text and physical is not None else {}
    pairs = {(a, b): kinds.get((a, b)) for a in physical or () for b in physical or () if a != b}
    if pairs and all(kind is not None and kind.startswith("NV") for kind in pairs.values()):
        return cluster.NVLINK, None
    near = cluster.PCIE if _peers(numbers) else cluster.PCIE_HOST
    if not pairs or None in pairs.values():
        return near, None
    together = sum(1 for b in physical if b == physical[0] or pairs[physical[0], b] != "SYS")
    return near, together


def parse_topology(text: str) -> dict[tuple[int, int], str]:
    """`nvidia-smi topo -m`: the kind of link (NV4, PIX, PXB, PHB, NODE, SYS) between two GPUs."""
    kinds = {}
    for line in _COLOUR.sub("", text).splitlines():
        words = line.split()
        if len(words) > 1 and (row := re.fullmatch(r"GPU(\d+)", words[0])) and not words[1].startswith("GPU"):
            for column, word in enumerate(words[1:]):
                if re.fullmatch(r"NV\d+|PIX|PXB|PHB|NODE|SYS", word):
                    kinds[int(row[1]), column] = word
    return kinds


def _topology() -> str | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        asked = subprocess.run(
            [program, "topo", "-m"], capture_output=True, text=True, timeout=ASK_SECONDS, check=True
        )
        return asked.stdout
    return None


def _physical(numbers: list[int]) -> list[int] | None:
    """nvidia-smi's numbers of torch's devices; None where CUDA_VISIBLE_DEVICES names them by UUID."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not visible:
        return numbers
    words = [word.strip() for word in visible.split(",")]
    if not all(word.isdigit() for word in words) or max(numbers) >= len(words):
        return None
    return [int(words[n]) for n in numbers]


def _peers(numbers: list[int]) -> bool:
    import torch

    with contextlib.suppress(RuntimeError, AssertionError):
        return all(torch.cuda.can_device_access_peer(a, b) for a in numbers for b in numbers if a != b)
    return False
