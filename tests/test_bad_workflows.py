"""Workflows, prefixes, pictures and folders that cannot be used: said by name, before anything runs."""

from __future__ import annotations

import json
import os
import stat
import time
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from comfy_xdit import cli
from comfy_xdit.headless import pictures
from comfy_xdit.headless.folders import Folders
from comfy_xdit.headless.format import override, read_workflow
from comfy_xdit.headless.validation import InvalidWorkflow, execution_order
from comfy_xdit.headless.workflow import node_classes
from comfy_xdit.planning.auto import layout_beside, layout_of
from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.spec import ControlNet, ModelSpec
from comfy_xdit.ranks.environment import ROOT
from comfy_xdit.ranks.registry import running_groups

DEMO = ROOT / "workflows" / "api" / "demo.json"
UI_DEMO = ROOT / "workflows" / "demo.json"


class Pass:
    """Hands on what it gets, and takes text of its own."""

    RETURN_TYPES, FUNCTION = ("THING",), "run"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {},
            "optional": {"thing": ("THING",), "other": ("THING",), "text": ("STRING", {}), "any": ("*",)},
        }


class End(Pass):
    RETURN_TYPES, OUTPUT_NODE = (), True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"thing": ("THING",)}}


CLASSES = {"Pass": Pass, "End": End}


def node(class_type: Any = "Pass", **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def graph(**changes: Any) -> dict[str, Any]:
    return {"1": node(), "2": node("End", thing=["1", 0])} | changes


# ---------------------------------------------------------------------- API format

WRONG = {
    "class_type that is a list": (graph(x=node(["Pass"])), r"class_type is \['Pass'\], which is no name"),
    "class_type that is an object": (graph(x=node({})), r"class_type is \{\}, which is no name"),
    "inputs that are a list": (graph(x={"class_type": "Pass", "inputs": [1]}), "inputs are no names"),
    "number at a socket": (graph(**{"2": node("End", thing=5)}), "thing is 5; it takes THING from another"),
    "text at a socket": (graph(**{"2": node("End", thing="x")}), "thing is 'x'; it takes THING.*link it"),
    "object at a socket": (graph(**{"2": node("End", thing={"a": 1})}), "it takes THING from another node"),
    "nothing at a socket": (graph(**{"2": node("End", thing=None)}), "thing is None; it takes THING"),
    "text at an optional socket": (graph(**{"1": node(thing="x")}), "thing is 'x'; it takes THING"),
    "a link of nothing": (graph(**{"2": node("End", thing=[])}), r"thing is \[\]; a link is"),
    "a link to a list": (graph(**{"2": node("End", thing=[[1], 0])}), r"linked to node \[1\], which is not"),
    "a link to a slot of text": (graph(**{"2": node("End", thing=["1", "0"])}), "a link is .node id"),
    "a circle": (graph(**{"1": node(thing=["3", 0]), "3": node(thing=["1", 0])}), "1 -> 3 -> 1 wait"),
    "a circle of one": (graph(**{"1": node(thing=["1", 0])}), "1 -> 1 wait for each other"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_workflow_is_refused(what):
    workflow, words = WRONG[what]
    with pytest.raises(InvalidWorkflow, match=words):
        execution_order(workflow, CLASSES)


def test_what_an_optional_socket_may_hold():
    """null is a socket without a link, and a wildcard takes anything."""
    assert execution_order(graph(**{"1": node(thing=None, any=5, text="x")}), CLASSES) == ["1", "2"]


@pytest.mark.parametrize("length", [1_500, 20_000])
def test_a_chain_of_any_length_has_an_order(length):
    workflow = {str(i): node(thing=[str(i - 1), 0], other=[str(i // 2), 0]) for i in range(1, length)}
    workflow = {"end": node("End", thing=[str(length - 1), 0]), "0": node()} | workflow
    began = time.process_time()
    assert execution_order(workflow, CLASSES) == [*map(str, range(length)), "end"]
    assert time.process_time() - began < 5


def test_diamonds_are_walked_once():
    """Each of 60 nodes needs the one before it twice: 2^60 paths."""
    workflow = {str(i): node(thing=[str(i - 1), 0], other=[str(i - 1), 0]) for i in range(1, 60)}
    workflow |= {"0": node(), "end": node("End", thing=["59", 0])}
    assert execution_order(workflow, CLASSES) == [*map(str, range(60)), "end"]


FILES = {
    "JSON 100,000 deep": (b"[" * 100_000, "is not JSON"),
    "JSON 100,000 deep, closed": (b"[" * 100_000 + b"]" * 100_000, "is not JSON"),
    "a value 200 deep": (b'{"1":{"class_type":"Pass","inputs":{"text":' + b"[" * 200 + b"]" * 200 + b"}}}",
                         "nested more than 100 deep"),
    "half a surrogate": (b'{"1":{"class_type":"Pass","inputs":{"text":"\\ud800"}}}', "surrogates not"),
    "no UTF-8": (b"\xff\xfe\xfd", "is not JSON"),
    "nodes that are numbers": (b'{"1": 2}', "is no ComfyUI workflow"),
}  # fmt: skip


@pytest.mark.parametrize("what", FILES)
def test_a_damaged_file_is_refused(what, tmp_path):
    content, words = FILES[what]
    (tmp_path / "w.json").write_bytes(content)
    with pytest.raises(InvalidInput, match=words) as caught:
        read_workflow(tmp_path / "w.json", CLASSES)
    assert "save the workflow anew" in str(caught.value) or "it has neither" in str(caught.value)


def test_a_workflow_without_end_is_not_read_to_its_end():
    with pytest.raises(InvalidInput, match="/dev/zero has more than 67,108,864 bytes; no workflow has"):
        read_workflow(Path("/dev/zero"), CLASSES)


def test_settings_of_damaged_nodes(tmp_path):
    workflow = {
        "1": {"class_type": ["Pass"], "inputs": {}},
        "2": 5,
        "3": {"class_type": "Pass", "inputs": [1]},
    }
    with pytest.raises(InvalidInput, match=r"no node '2'; there are 1 \(\['Pass'\]\), 3 \(Pass\)"):
        override(workflow, "2.text=x", CLASSES)
    with pytest.raises(InvalidInput, match="the inputs of node 3 are no names with values"):
        override(workflow, "3.text=x", CLASSES)
    with pytest.raises(InvalidInput, match="node 1 has no input 'text'"):
        override(workflow, "1.text=x", CLASSES)
    override(good := graph(), f"1.text={'[' * 100_000}", CLASSES)
    assert good["1"]["inputs"]["text"] == "[" * 100_000  # no JSON that anything can use, so it is text


# ---------------------------------------------------------------------- UI format


def ui(link: Any = (1, 10, 0, 20, 0, "THING"), slots: Any = None, source: Any = None, **more: Any) -> dict:
    slots = [{"name": "thing", "type": "THING", "link": 1}] if slots is None else slots
    nodes = [source or {"id": 10, "type": "Pass"}, {"id": 20, "type": "End", "inputs": slots}]
    return {"nodes": nodes, "links": [list(link) if isinstance(link, tuple) else link], **more}


DAMAGED = {
    "a link that is text": (ui("x"), "link 'x' of the workflow is damaged"),
    "a link that is null": (ui(None), "link None of the workflow is damaged"),
    "a link without an end": (ui((1, 10)), r"link \[1, 10\] of the workflow is damaged"),
    "a link whose id is a list": (ui(([1], 10, 0, 20, 0, "THING")), r"link \[\[1\], .* is damaged"),
    "a link from a list": (ui((1, [10], 0, 20, 0, "THING")), "is damaged"),
    "a link from a slot of text": (ui((1, 10, "0", 20, 0, "THING")), "is damaged"),
    "a link as an empty object": (ui({}), "link .* of the workflow is damaged"),
    "links that are a number": ({**ui(), "links": 5}, "the links of the workflow are damaged"),
    "a slot that is text": (ui(slots=["thing"]), "the inputs of node 20 of the workflow are damaged"),
    "a slot without a name": (ui(slots=[{"link": 1}]), "the inputs of node 20 of the workflow are damaged"),
    "a slot with a list for a link": (ui(slots=[{"name": "thing", "link": [1]}]), "node 20 .* damaged"),
    "slots that are an object": (ui(slots={"thing": 1}), "inputs of node 20 of the workflow are damaged"),
    "a slot whose link is not there": (ui(slots=[{"name": "thing", "link": 9}]), "link 9 .* leads nowhere"),
    "a type that is a list": (ui(source={"id": 10, "type": ["Pass"]}), "no id or no type"),
    "an id that is a list": (ui(source={"id": [10], "type": "Pass"}), "no id or no type"),
    "values that are a number": (ui(source={"id": 10, "type": "Pass", "widgets_values": 5}), "values of"),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_picture_of_a_graph_is_refused(what, tmp_path):
    content, words = DAMAGED[what]
    (tmp_path / "w.json").write_text(json.dumps(content))
    with pytest.raises(InvalidInput, match=words):
        read_workflow(tmp_path / "w.json", CLASSES)


@pytest.mark.parametrize("slot", [-1, 7, 10**30])
def test_a_bypassed_node_is_asked_for_a_slot_it_lacks(slot, tmp_path):
    source = {"id": 10, "type": "Pass", "mode": 4, "inputs": [{"name": "thing", "type": "X", "link": None}]}
    (tmp_path / "w.json").write_text(json.dumps(ui((1, 10, slot, 20, 0, "THING"), source=source)))
    assert read_workflow(tmp_path / "w.json", CLASSES).api["20"]["inputs"] == {}


@pytest.mark.parametrize("values", [{"a": 5}, [], {}, None])
def test_values_of_a_primitive_in_either_form(values, tmp_path):
    source = {"id": 10, "type": "PrimitiveNode", "widgets_values": values}
    (tmp_path / "w.json").write_text(json.dumps(ui(source=source)))
    api = read_workflow(tmp_path / "w.json", CLASSES).api
    assert api["20"]["inputs"] == {"thing": 5 if values == {"a": 5} else None}


# ---------------------------------------------------------------------- what is written, and where

PREFIXES = {
    "": "names no file", ".": "names no file", "./": "names no file",
    "../x": "leads out of the output folder", "a/../../x": "leads out", "/tmp/x": "leads out",
    "a\0b": "characters that no file name has", "a\nb": "characters that no file name has",
    "x" * 400: "has 400 bytes, 400 of them", "é" * 150: "has 300 bytes", "x/" * 600: "has 1200 bytes",
}  # fmt: skip


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_prefix_that_names_no_file_is_refused_before_anything_runs(prefix, tmp_path):
    workflow = json.loads(DEMO.read_text())
    save = next(n for n, content in workflow.items() if content["class_type"] == "SaveImage")
    workflow[save]["inputs"]["filename_prefix"] = prefix
    with pytest.raises(InvalidWorkflow, match=PREFIXES[prefix]) as caught:
        execution_order(workflow, node_classes())
    assert [p.kind for p in caught.value.problems] == ["custom_validation_failed"]
    output = tmp_path / "output"
    output.mkdir()
    with pytest.raises(InvalidInput, match=PREFIXES[prefix]):  # as a linked text comes
        pictures.save(torch.zeros(1, 8, 8, 3), prefix, Folders(output), {}, {})
    assert list(tmp_path.iterdir()) == [output] and not list(output.iterdir())


@pytest.mark.parametrize("prefix", ["x", "x" * 200, "a/b c/ü", "%year%/%width%x", "dir/"])
def test_a_prefix_that_names_a_file(prefix, tmp_path):
    pictures.save(torch.zeros(1, 8, 8, 3), prefix, folders := Folders(tmp_path), {}, {})
    assert folders.written[0].is_file() and folders.written[0].is_relative_to(tmp_path)


def test_a_link_that_leads_out_of_the_output_folder(tmp_path):
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "out").symlink_to(tmp_path)
    with pytest.raises(InvalidInput, match="leads out of"):
        pictures.save(torch.zeros(1, 8, 8, 3), "out/x", Folders(tmp_path / "output"), {}, {})


def _file(path: Path) -> Path:
    path.write_text("in the way")
    return path


OUTPUTS = {
    "a file": lambda folder: _file(folder / "file"),
    "below a file": lambda folder: _file(folder / "file") / "output",
    "a system's own folder": lambda folder: Path("/proc/self/task"),
    "a long name": lambda folder: folder / ("x" * 400),
    "a NUL": lambda folder: folder / "a\0b",
}


@pytest.mark.parametrize("what", OUTPUTS)
def test_an_output_that_cannot_be_written_is_exit_code_2_and_starts_nothing(what, tmp_path, capsys):
    before = [group.pids for group in running_groups()]
    output = OUTPUTS[what](tmp_path)
    for command in (["run", str(DEMO), "--quiet"], ["demo"]):
        assert cli.main([*command, "--output", str(output)]) == cli.INVALID
        printed = capsys.readouterr()
        assert printed.err.startswith("comfy-xdit: nothing can be written to ")
        assert "name another folder with --output" in printed.err and printed.out == ""
    assert [group.pids for group in running_groups()] == before


def test_a_disk_that_fills_up_while_a_picture_is_written_leaves_no_part_of_it(tmp_path):
    """The largest file that this process may write is smaller than the picture."""
    import resource
    import signal

    images = torch.rand(1, 256, 256, 3, generator=torch.Generator().manual_seed(0))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(InvalidInput, match="cannot be written: File too large; name another folder"):
            pictures.save(images, "x", Folders(tmp_path), {}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------- pictures that are read


def _png(width: int, height: int) -> bytes:
    """The beginning of a PNG that says it is so large."""
    import struct

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 100))


def _frames(file: Path, count: int) -> None:
    first, *rest = [Image.new("P", (4000, 4000), i % 2) for i in range(count)]
    first.save(file, save_all=True, append_images=rest, loop=0)


PICTURES = {
    "20,000 x 20,000": (lambda f: f.write_bytes(_png(20_000, 20_000)), "is too large: .*; scale it down"),
    "2^31 wide": (
        lambda f: f.write_bytes(_png(2**31 - 1, 2**31 - 1)),
        "is too large|cannot be read as a picture",
    ),
    "many frames": (lambda f: _frames(f.with_suffix(".gif"), 15), "is too large: its frames have more"),
    "cut off": (lambda f: f.write_bytes(_png(64, 64)), "cannot be read as a picture"),
    "text": (lambda f: f.write_text("GIF89a"), "cannot be read as a picture"),
    "nothing": (lambda f: f.write_bytes(b""), "cannot be read as a picture"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("what", PICTURES)
def test_a_picture_that_cannot_be_read(what, tmp_path):
    make, words = PICTURES[what]
    make(tmp_path / "x.png")
    (file,) = tmp_path.iterdir()
    with pytest.raises(InvalidInput, match=words):
        pictures.load(file)


# ---------------------------------------------------------------------- what is no model, and no layout


@pytest.mark.parametrize("value", ["auto", 2, ["1", 0], {"strategy": "auto"}])
def test_a_layout_that_is_none(value):
    """ComfyUI hands a constant at a socket on to the node."""
    spec = ModelSpec(str(DEMO), "transformer")
    for refuses in (lambda: layout_of(value, spec), lambda: layout_beside(value)):
        with pytest.raises(
            InvalidInput, match=r"parallel is .*, which is no layout; link it to an 'xDiT Par"
        ):
            refuses()


def test_a_fifo_is_no_model(tmp_path):
    os.mkfifo(tmp_path / "fifo.safetensors")
    assert stat.S_ISFIFO((tmp_path / "fifo.safetensors").stat().st_mode)
    for kind in ("transformer", "vae"):
        with pytest.raises(InvalidInput, match=r"fifo\.safetensors is a FIFO; choose a model that exists"):
            ModelSpec.of(tmp_path / "fifo.safetensors", kind)
    with pytest.raises(InvalidInput, match=r"fifo\.safetensors is a FIFO; choose a ControlNet that exists"):
        ControlNet.of(tmp_path / "fifo.safetensors")
    assert ModelSpec.of(tmp_path, "vae").stamp == (0, 0)  # and in a folder it is not waited for
