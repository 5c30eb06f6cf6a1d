"""The pack as a ComfyUI with none of its packages sees it: it imports, and says what is missing."""

import json
import subprocess
import sys

import pytest

from comfy_xdit.ranks.environment import ROOT

# -S -I: no site-packages, no environment, no current folder: the standard library alone.
PROGRAM = """
import json, sys
from importlib.util import module_from_spec, spec_from_file_location

root = sys.argv[1]
path_before = list(sys.path)
name = "/somewhere/custom_nodes/comfy_xdit"  # ComfyUI names a pack after its path
spec = spec_from_file_location(name, root + "/__init__.py", submodule_search_locations=[root])
pack = module_from_spec(spec)
sys.modules[name] = pack
spec.loader.exec_module(pack)
said = {}
for key, node in pack.NODE_CLASS_MAPPINGS.items():
    try:
        getattr(node(), node.FUNCTION)(steps=1)
    except Exception as error:
        said[key] = [type(error).__name__, str(error), node.INPUT_TYPES(), list(node.RETURN_TYPES)]
print(json.dumps({
    "said": said,
    "titles": pack.NODE_DISPLAY_NAME_MAPPINGS,
    "web": pack.WEB_DIRECTORY,
    "package": sys.modules["comfy_xdit"].__file__,
    "path_untouched": sys.path == path_before,
    "torch": "torch" in sys.modules,
}))
"""


@pytest.fixture(scope="module")
def bare() -> subprocess.CompletedProcess:
    command = [sys.executable, "-S", "-I", "-c", PROGRAM, str(ROOT)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)


@pytest.fixture(scope="module")
def pack(bare) -> dict:
    return json.loads(bare.stdout)


def test_pack_is_bound_under_its_real_name_and_leaves_the_path_alone(pack):
    assert pack["package"] == str(ROOT / "comfy_xdit" / "__init__.py")
    assert pack["path_untouched"]
    assert not pack["torch"]
    assert (ROOT / pack["web"] / "docs").is_dir()


def test_every_node_is_there_and_says_what_is_missing(pack):
    assert pack["said"].keys() == pack["titles"].keys()
    assert {"XDiTLoadPipeline", "XDiTLoadDiffusionModel", "XDiTSampler"} <= pack["said"].keys()
    for kind, text, inputs, outputs in pack["said"].values():
        assert kind == "XDiTError"
        assert text.count("\n") == 0
        assert "needs torch, safetensors" in text
        assert "-m pip install torch -r" in text
        assert inputs == {"required": {}}
        assert outputs


def test_log_has_one_line(bare):
    (line,) = bare.stderr.splitlines()
    assert line.startswith("comfy_xdit: its nodes do not work until torch, safetensors")


def test_every_node_has_a_help_page(pack):
    for name, title in pack["titles"].items():
        lines = (ROOT / "web" / "docs" / f"{name}.md").read_text().splitlines()
        assert lines[0] == f"# {title}"
        assert len(lines) >= 10


def test_no_node_is_listed_twice():
    import nodes

    assert len(nodes.NODES) == len(set(nodes.NODES)) == len(nodes.NODE_CLASS_MAPPINGS)
