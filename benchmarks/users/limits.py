"""What of the pack grows with hosts or with ranks, as numbers from its code and from what was measured."""

from __future__ import annotations

from benchmarks.users.studies import KEPT_RESTART, RESTART, switchings
from comfy_xdit.planning.published import PUBLISHED
from comfy_xdit.protocol.rpc import DESCRIPTORS, RANK_DESCRIPTORS
from comfy_xdit.ranks.deadlines import FIRST_WORK_SECONDS
from comfy_xdit.ranks.holders import LINGER_SECONDS
from comfy_xdit.ranks.logs import KEPT

USUAL_DESCRIPTORS = 1024  # `ulimit -n` of most systems
# Median ms of a denoise call of 512 KiB without the transformer, by ranks: docs/performance.md, "The bridge".
BRIDGE = {1: 0.36, 2: 0.55, 4: 0.87}
STORAGE = 1.25e9  # bytes per second of one filer on 10 Gbit/s
GPU_HOURS_PER_FAULT = 50_000  # 419 unexpected interruptions, 16,384 H100, 54 days: arXiv 2407.21783


def figures() -> dict[str, float]:
    """By the names of the template."""
    flux = PUBLISHED["flux"].parameters * 2
    per_rank = (BRIDGE[4] - BRIDGE[1]) / 3
    rate = switchings()["today"].rate
    return {
        "linger": LINGER_SECONDS,
        "restart": RESTART,
        "kept_restart": KEPT_RESTART,
        "logs": KEPT,
        "most_ranks": (USUAL_DESCRIPTORS - DESCRIPTORS) // RANK_DESCRIPTORS,
        "per_rank": per_rank,
        "bridge_16": BRIDGE[1] + 15 * per_rank,
        "flux_gb": flux / 1e9,
        "rate": rate / 1e9,
        "flux_load": flux / rate,
        "cold_10": 10 * flux / STORAGE,
        "cold_100": 100 * flux / STORAGE / 60,
        "cold_1000": 1000 * flux / STORAGE / 3600,
        "first_work": FIRST_WORK_SECONDS,
        "hosts_in_time": int(FIRST_WORK_SECONDS * STORAGE / flux) + 1,
        "fault_hours": GPU_HOURS_PER_FAULT / 8000,
        "fault_days": GPU_HOURS_PER_FAULT / 80 / 24,
    }
