"""The wheels that a machine with a GPU and no network lacks, into a folder: `make wheels-gpu`.

Usage: python scripts/gpu_wheels.py [FOLDER] [--python 3.12]

That machine has torch, transformers, accelerate and the tests' tools; a diffusers without its needs is
enough. Versions are those of constraints.txt. Behind it the size of each is printed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# xfuser's pipelines import beautifulsoup4, diffusers importlib_metadata; all are plain Python.
NAMES = (
    *("diffusers", "xfuser", "distvae", "yunchang"),
    *("beautifulsoup4", "soupsieve", "importlib_metadata"),
)
MOST_BYTES = 48 << 20  # with the working tree 64 MiB travel to a machine that is lent


def download(folder: Path, python: str) -> list[Path]:
    """The wheels, one of each package. Raises CalledProcessError when pip cannot have one."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.whl"):  # two versions of a package stop an install
        old.unlink()
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"),
            *("--no-deps", "--only-binary=:all:", "--python-version", python, "--implementation", "cp"),
            *("--platform", "manylinux_2_28_x86_64", "--platform", "manylinux2014_x86_64"),
            *("--constraint", str(ROOT / "constraints.txt"), "--dest", str(folder), *NAMES),
        ],
        check=True,
    )
    return sorted(folder.glob("*.whl"))


def main() -> int:
    """Download, list; 1 if they are too large to travel."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / ".whl")
    parser.add_argument("--python", default="3.12", help="that machine's version")
    arguments = parser.parse_args()
    wheels = download(arguments.folder, arguments.python)
    for wheel in wheels:
        print(f"{wheel.stat().st_size:>10,}  {wheel.name}")
    total = sum(wheel.stat().st_size for wheel in wheels)
    print(f"{total:>10,}  bytes in {len(wheels)} wheels in {arguments.folder}")
    if total > MOST_BYTES:
        print(f"more than {MOST_BYTES:,} bytes: they do not travel with the working tree", file=sys.stderr)
    return int(total > MOST_BYTES)


if __name__ == "__main__":
    sys.exit(main())
