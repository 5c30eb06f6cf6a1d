"""`make bench`: part after part, each with the time it took.

Usage: python -m benchmarks [PART ...]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time

# What takes seconds comes first.
PARTS = (
    "twin", "seam", "pipefusion_cost", "bridge", "steps", "traffic", "editions", "speed", "sharding", "vae"
)  # fmt: skip


def main() -> int:
    """Run them; 1 if one failed, after the others."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"one of {', '.join(PARTS)}; none is all")
    parts = parser.parse_args().parts or PARTS
    if unknown := sorted(set(parts) - set(PARTS)):
        parser.error(f"{', '.join(unknown)} is no part; choose among {', '.join(PARTS)}")
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores: nothing else should run")
    taken: dict[str, float] = {}
    failed = []
    for part in parts:
        print(f"\n== {part}", flush=True)
        began = time.perf_counter()
        if subprocess.run([sys.executable, "-m", f"benchmarks.{part}"]).returncode:
            failed.append(part)
        taken[part] = time.perf_counter() - began
        print(f"== {part} took {taken[part]:.0f} s", flush=True)
    each = ", ".join(f"{part} {seconds:.0f}" for part, seconds in taken.items())
    print(f"\n{sum(taken.values()) / 60:.1f} minutes; seconds by part: {each}")
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
