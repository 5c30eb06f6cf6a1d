"""The laws of the layout: who may import whom, read from the source."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
COMFYUI = {"comfy", "folder_paths", "latent_preview", "comfy_extras", "comfy_api", "execution", "server"}
HEAVY = {"diffusers", "transformers", "xfuser", "distvae", "accelerate", "yunchang"}


def imports(path: Path) -> set[str]:
    """Top-level names of every absolute import in a file, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            names |= {a.value.split(".")[0] for a in node.args[:1] if isinstance(a, ast.Constant)}
    return names


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


def test_two_modules_of_the_ranks_know_xfuser():
    known = {"worker/parallel/groups.py", "worker/parallel/xfuser_compat.py"}
    assert users("worker", {"xfuser", "yunchang"}) == known


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
    for name in listed.split():
        if name.endswith((".py", ".md", ".toml", ".txt", ".json", "Makefile")):
            text = (ROOT / name).read_text()
            found = [mark for mark in marks if mark in text]
            assert not found, f"{name} holds {found}"
