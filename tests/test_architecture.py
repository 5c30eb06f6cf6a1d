"""The laws of the layout: who may import whom, read from the source."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests import rooms

ROOT = Path(__file__).parent.parent
COMFYUI = {"comfy", "folder_paths", "latent_preview", "comfy_extras", "comfy_api", "execution", "server"}
HEAVY = {"diffusers", "transformers", "xfuser", "distvae", "accelerate", "yunchang"}


def imports(path: Path) -> set[str]:
    """Top-level names of every absolute import in a file, inside functions too."""
    return {module.split(".")[0] for module, _ in rooms.imported(path)}


def files(folder: str) -> list[Path]:
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found
    return found


def users(folder: str, modules: set[str]) -> set[str]:
    return {str(f.relative_to(ROOT)) for f in files(folder) if imports(f) & modules}


def test_the_host_side_imports_neither_the_ranks_nor_their_libraries():
    assert users("comfy_xdit", HEAVY | {"worker"}) == set()


def test_one_part_of_the_host_side_knows_comfyui():
    assert all(name.startswith("comfy_xdit/comfy_types/") for name in users("comfy_xdit", COMFYUI))


def test_one_folder_of_the_ranks_knows_comfyui():
    assert all(name.startswith("worker/models/comfyui/") for name in users("worker", COMFYUI))
    assert users("worker", COMFYUI - {"comfy"} | {"nodes"}) == set(), "its packages only, not its root"


def test_of_the_host_side_the_ranks_import_the_protocol_alone():
    taken = {module for f in files("worker") for module, _ in rooms.imported(f)}
    host = {module for module in taken if module.split(".")[0] == "comfy_xdit"}
    assert host, "they do import it"
    assert all(f"{module}.".startswith("comfy_xdit.protocol.") for module in host)


def test_two_modules_of_the_ranks_know_xfuser():
    known = {"worker/parallel/groups.py", "worker/parallel/xfuser_compat.py"}
    assert users("worker", {"xfuser", "yunchang"}) == known


# An arrow is a file that imports a file of another room. What every room uses and uses none is counted apart:
# comfy_xdit.protocol, which both processes share, and in the ranks checkpoints, weights on disk. The rule is
# of first-level folders. On the host side the files beside them (commands) are counted as rooms too; in the
# ranks they are not: __main__ and engine put the rooms together, loop and store are what these two run on.
MOST = {"host": 60, "ranks": 40}
BESIDE_COUNT = {"host": True, "ranks": False}
both_sides = pytest.mark.parametrize("side", rooms.SIDES)


@both_sides
def test_few_imports_cross_from_room_to_room(side):
    package = rooms.SIDES[side]
    print(rooms.counts(package))
    vocabulary = rooms.VOCABULARY[package]
    crossing = {(a, b) for a, b in rooms.between(rooms.arrows(package)) if rooms.room(b) != vocabulary}
    counted = crossing if BESIDE_COUNT[side] else rooms.of_folders(crossing)
    assert 0 < len(counted) <= MOST[side]


@both_sides
def test_what_is_counted_apart_uses_no_room(side):
    package = rooms.SIDES[side]
    vocabulary = rooms.VOCABULARY[package]
    assert {b for a, b in rooms.between(rooms.arrows(package)) if rooms.room(a) == vocabulary} == set()


STARTS = {"worker.__main__", "worker.template"}


def test_who_puts_the_rooms_of_the_ranks_together_is_used_by_none_of_them():
    assert {a for a, b in rooms.arrows("worker") if b == "worker.engine"} == STARTS
    assert {a for a, b in rooms.arrows("worker") if b == "worker.__main__"} == set()
    assert {a for a, b in rooms.arrows("worker") if b == "worker.template"} == set()


# Cannot be imported before the ComfyUI that the host runs is, so that no room's own file can.
OTHER_DOOR = "worker.models.comfyui."


@both_sides
def test_a_room_with_a_door_is_entered_through_it(side):
    """One whose own file says what it gives: what is behind it may then be moved and renamed freely."""
    package = rooms.SIDES[side]
    doors = rooms.doors(package)
    assert doors
    into = {(a, b) for a, b in rooms.between(rooms.arrows(package)) if f"{package}.{rooms.room(b)}" in doors}
    past = {(a, b) for a, b in into if b not in doors and not b.startswith(OTHER_DOOR)}
    assert past == set()


@both_sides
def test_nothing_imports_in_a_circle(side):
    arrows = rooms.arrows(rooms.SIDES[side])
    assert rooms.circle(arrows) == []
    assert rooms.circle((rooms.room(a), rooms.room(b)) for a, b in rooms.between(arrows)) == []


def test_circles_are_found_wherever_the_import_stands(tmp_path):
    house = tmp_path / "house"
    for name, text in {
        "__init__": "",
        "up/__init__": "",
        "up/one": "from house.down import two",
        "down/__init__": "",
        "down/two": "import typing\nif typing.TYPE_CHECKING:\n    from house.up.other import Name",
        "up/other": "def call():\n    import house.down.three",
        "down/three": "from house import __version__",
    }.items():
        (house / name).parent.mkdir(parents=True, exist_ok=True)
        (house / f"{name}.py").write_text(text)

    found = rooms.arrows("house", tmp_path)

    assert found == {
        ("house.up.one", "house.down.two"),
        ("house.down.two", "house.up.other"),
        ("house.up.other", "house.down.three"),
        ("house.down.three", "house"),
    }
    assert rooms.circle(found) == []  # of files; of rooms there is one
    assert len(rooms.between(found)) == 3
    assert set(rooms.circle((rooms.room(a), rooms.room(b)) for a, b in rooms.between(found))) == {
        "up",
        "down",
    }
    assert rooms.circle([*found, ("house.down.three", "house.up.one")])


def test_the_transport_is_known_in_one_place():
    store = {
        str(f.relative_to(ROOT))
        for folder in ("comfy_xdit", "worker")
        for f in files(folder)
        if "TCPStore" in ast.unparse(_without_docstrings(f))
        or "queue_push" in ast.unparse(_without_docstrings(f))
    }
    assert store == {"comfy_xdit/protocol/rpc.py"}


def _without_docstrings(path: Path) -> ast.Module:
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if (
            isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
            and ast.get_docstring(node) is not None
        ):
            node.body = node.body[1:] or [ast.Pass()]
    return tree


def test_nothing_crosses_the_bridge_as_pickle():
    for folder in ("comfy_xdit", "worker"):
        assert users(folder, {"pickle", "marshal", "shelve", "dill", "cloudpickle"}) == set()


def test_a_broad_except_stands_once_at_the_process_boundary():
    broad = []
    for folder in ("comfy_xdit", "worker"):
        for path in files(folder):
            for node in ast.walk(ast.parse(path.read_text())):
                names = ast.unparse(node.type) if isinstance(node, ast.ExceptHandler) and node.type else ""
                bare = isinstance(node, ast.ExceptHandler) and node.type is None
                ends_in_raise = isinstance(node, ast.ExceptHandler) and isinstance(node.body[-1], ast.Raise)
                if (bare or names in ("Exception", "BaseException")) and not ends_in_raise:
                    broad.append(str(path.relative_to(ROOT)))
    assert broad == ["worker/loop.py"], "catching everything and going on hides a wrong image"


def test_no_path_of_a_machine_is_in_the_tree():
    import subprocess

    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    marks = [f"/{name}/" for name in ("work", "farm", "root", "home")]
    for name in listed.splitlines():
        if name.endswith((".py", ".md", ".toml", ".txt", ".json", ".yml", "Makefile")):
            text = (ROOT / name).read_text()
            found = [mark for mark in marks if mark in text]
            assert not found, f"{name} holds {found}"
