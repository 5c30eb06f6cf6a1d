"""The rooms of a package (its first-level folders and the modules beside them) and what they import.

`python -m tests.rooms` prints them for both sides.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent
SIDES = {"host": "comfy_xdit", "ranks": "worker"}
# Counted apart, as every room may use it and it uses none: what both processes share, and weights on disk.
VOCABULARY = {"comfy_xdit": "protocol", "worker": "checkpoints"}
Arrow = tuple[str, str]  # importing module, imported module


def imported(path: Path) -> Iterator[tuple[str, str]]:
    """(module, name in it or "") of every import of a file, inside functions and for types only too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            yield from ((a.value, "") for a in node.args[:1] if isinstance(a, ast.Constant))


def arrows(package: str, root: Path = ROOT) -> set[Arrow]:
    """The imports between files of a package. A folder's own file (__init__) goes by the folder's name."""
    modules = {}
    for path in (root / package).rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    found = set()
    for module, path in modules.items():
        for source, name in imported(path):
            inner = f"{source}.{name}"  # `from folder import file` is an import of the file
            found.add((module, inner if inner in modules else source))
    return {(one, other) for one, other in found if other in modules and one != other}


def room(module: str) -> str:
    """The first-level folder, or the module beside the folders; the package itself is the house: ''."""
    return [*module.split("."), ""][1]


def between(all_arrows: Iterable[Arrow]) -> set[Arrow]:
    """Those that cross the border of a room. What the house itself says (version, root) is no room's."""
    return {(a, b) for a, b in all_arrows if room(a) != room(b) and room(a) and room(b)}


def of_folders(all_arrows: Iterable[Arrow], root: Path = ROOT) -> set[Arrow]:
    """Those from a first-level folder to a first-level folder."""
    return {arrow for arrow in all_arrows if all((root / _path(one)).is_dir() for one in arrow)}


def _path(module: str) -> Path:
    """Of its room."""
    return Path(*module.split(".")[:2])


def doors(package: str, root: Path = ROOT) -> set[str]:
    """The rooms whose own file says what others use of them (`__all__`)."""
    files = (root / package).glob("*/__init__.py")
    return {f"{package}.{file.parent.name}" for file in files if "__all__ = " in file.read_text()}


def circle(all_arrows: Iterable[tuple[str, str]]) -> list[str]:
    """One that the arrows make, from its first name round to the same; empty if there is none."""
    waits: dict[str, set[str]] = {}
    for one, other in all_arrows:
        waits.setdefault(one, set()).add(other)
    try:
        TopologicalSorter(waits).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def counts(package: str) -> str:
    """In words: how many imports cross, and between which rooms."""
    crossing, vocabulary = between(arrows(package)), VOCABULARY[package]
    pairs = Counter((room(a), room(b)) for a, b in crossing)
    own = {(a, b) for a, b in crossing if room(b) != vocabulary}
    lines = [
        f"{package}: {len(own)} imports between rooms, {len(of_folders(own))} of them between folders; and "
        f"{len(crossing) - len(own)} of {vocabulary}; {len(pairs)} pairs of rooms"
    ]
    return "\n".join(lines + [f"  {a} -> {b}: {n}" for (a, b), n in sorted(pairs.items())])


if __name__ == "__main__":
    for side in SIDES.values():
        print(counts(side))
