"""Workflows without a server: checks with ComfyUI's error types, execution order, UI format, files."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from comfy_xdit.headless import pictures, stock_nodes
from comfy_xdit.headless import surroundings as headless
from comfy_xdit.headless.folders import Folders
from comfy_xdit.headless.format import WorkflowFile, api_of, override, read_workflow
from comfy_xdit.headless.validation import InvalidWorkflow, execution_order
from comfy_xdit.headless.workflow import NodeFailed, node_classes, run
from comfy_xdit.protocol.errors import Interrupted, InvalidInput
from comfy_xdit.ranks.environment import ROOT


class Number:
    """A value with a range and a list of choices; counts how often it ran."""

    RETURN_TYPES, FUNCTION = ("NUMBER",), "make"
    runs = 0

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {"seed": ("INT", {"min": 0, "max": 9}), "mode": (["plain", "double"],)},
            "optional": {"scale": ("FLOAT", {"default": 1.0})},
        }

    def make(self, seed, mode, scale=1.0):
        Number.runs += 1
        return (seed * scale * (2 if mode == "double" else 1),)


class Add:
    """Two numbers to one."""

    RETURN_TYPES, FUNCTION = ("NUMBER",), "add"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"a": ("NUMBER",), "b": ("NUMBER",)}}

    def add(self, a, b):
        return (a + b,)


class Show:
    """Ends a graph; refuses numbers above 100 in its own check of `limit`."""

    RETURN_TYPES, FUNCTION, OUTPUT_NODE = (), "show", True

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {"number": ("NUMBER",), "limit": ("INT", {"default": 1, "max": 5})},
            "hidden": {"prompt": "PROMPT", "me": "UNIQUE_ID"},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, limit):
        return True if limit <= 100 else "limit is above 100"

    def show(self, number, limit, prompt, me):
        return {"ui": {"text": [number]}, "result": (number, me, prompt)}


class Fails:
    """Raises what a rank or a person may cause."""

    RETURN_TYPES, FUNCTION, OUTPUT_NODE = (), "fail", True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"how": ("STRING", {})}}

    def fail(self, how):
        if how == "interrupt":
            headless.request_interrupt()
            return ()
        raise InvalidInput("no such thing")


CLASSES = {c.__name__: c for c in (Number, Add, Show, Fails)}


def graph(**changes):
    """2 + 2 * 3, shown; `changes` are inputs by `<node>_<input>`."""
    workflow = {
        "1": {"class_type": "Number", "inputs": {"seed": 2, "mode": "plain"}},
        "2": {"class_type": "Number", "inputs": {"seed": 3, "mode": "double"}},
        "3": {"class_type": "Add", "inputs": {"a": ["1", 0], "b": ["2", 0]}},
        "4": {"class_type": "Show", "inputs": {"number": ["3", 0], "limit": 1}},
    }
    for name, value in changes.items():
        node, input_name = name[1:].split("_", 1)
        workflow[node]["inputs"][input_name] = value
    return workflow


def problems_of(workflow) -> list[tuple[str, str]]:
    with pytest.raises(InvalidWorkflow) as caught:
        execution_order(workflow, CLASSES)
    return [(problem.kind, problem.node) for problem in caught.value.problems]


def run_graph(workflow, tmp_path):
    return run(WorkflowFile(workflow), Folders(tmp_path), CLASSES)


# ---------------------------------------------------------------------- execution


def test_every_node_runs_once_after_those_it_needs(tmp_path):
    Number.runs = 0
    finished = run_graph(graph(n3_b=["1", 0]), tmp_path)
    assert finished.outputs["3"] == (4,)
    assert Number.runs == 1  # node 2 is needed by nothing
    assert list(finished.outputs) == ["1", "3", "4"]


def test_hidden_inputs_and_results_beside_ui(tmp_path):
    workflow = graph()
    number, me, prompt = run_graph(workflow, tmp_path).outputs["4"]
    assert (number, me) == (8, "4")
    assert prompt is workflow


def test_text_is_converted_to_the_type_of_the_input(tmp_path):
    assert run_graph(graph(n1_seed="4", n1_scale="0.5"), tmp_path).outputs["1"] == (2.0,)


def test_an_error_names_its_node(tmp_path):
    workflow = {"7": {"class_type": "Fails", "inputs": {"how": "raise"}}}
    with pytest.raises(NodeFailed, match=r"node 7 \(Fails\): no such thing") as caught:
        run_graph(workflow, tmp_path)
    assert isinstance(caught.value.__cause__, InvalidInput)


def test_an_interrupt_stops_before_the_next_node(tmp_path):
    Number.runs = 0
    asks = {"5": {"class_type": "Fails", "inputs": {"how": "interrupt"}}}
    with pytest.raises(Interrupted):
        run_graph({**asks, **graph()}, tmp_path)
    assert Number.runs == 0
    assert not headless.interrupted()


def test_a_node_that_works_on_lists_is_refused(tmp_path):
    class Lists(Show):
        INPUT_IS_LIST = True

    with pytest.raises(InvalidInput, match="works on lists"):
        run(WorkflowFile(graph()), Folders(tmp_path), {**CLASSES, "Show": Lists})


# ---------------------------------------------------------------------- validation


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"n1_seed": -1}, ("value_smaller_than_min", "1")),
        ({"n1_seed": 10}, ("value_bigger_than_max", "1")),
        ({"n1_seed": "many"}, ("invalid_input_type", "1")),
        ({"n1_scale": float("nan")}, ("invalid_input_type", "1")),
        ({"n2_mode": "triple"}, ("value_not_in_list", "2")),
        ({"n3_a": ["1"]}, ("bad_linked_input", "3")),
        ({"n3_a": ["9", 0]}, ("bad_linked_input", "3")),
        ({"n3_a": ["1", 4]}, ("bad_linked_input", "3")),
        ({"n1_seed": ["2", 0]}, ("return_type_mismatch", "1")),
        ({"n4_limit": 101}, ("custom_validation_failed", "4")),
        ({"n3_a": ["3", 0]}, ("dependency_cycle", "3")),
    ],
)
def test_a_wrong_value_is_refused_as_comfyui_does(changes, expected):
    assert problems_of(graph(**changes)) == [expected]


def test_an_own_check_replaces_the_range():
    assert execution_order(graph(n4_limit=50), CLASSES)  # above `max`, which VALIDATE_INPUTS overrides


def test_everything_that_is_wrong_is_said_at_once():
    workflow = graph(n1_seed=-1, n2_mode="triple")
    del workflow["3"]["inputs"]["a"]
    assert problems_of(workflow) == [("value_not_in_list", "2"), ("required_input_missing", "3")]


def test_a_missing_node_type_is_named():
    workflow = graph()
    workflow["1"]["class_type"] = "Nmber"
    with pytest.raises(InvalidWorkflow, match="node type Nmber is not known here; known are Add, Fails"):
        execution_order(workflow, CLASSES)


def test_a_workflow_without_an_output_is_refused():
    workflow = graph()
    del workflow["4"]
    assert problems_of(workflow) == [("prompt_no_outputs", "")]


@pytest.mark.parametrize("node", [{"inputs": {}}, {"class_type": "Number"}, "Number"])
def test_a_damaged_node_is_refused(node):
    assert problems_of({**graph(), "1": node}) == [("invalid_prompt", "1")]


# ---------------------------------------------------------------------- files and settings


@pytest.mark.parametrize(
    ("content", "words"),
    [("{", "is not JSON"), ("[]", "is no ComfyUI workflow"), ("{}", "is no ComfyUI workflow")],
)
def test_a_file_that_is_no_workflow_is_refused(tmp_path, content, words):
    path = tmp_path / "workflow.json"
    path.write_text(content)
    with pytest.raises(InvalidInput, match=words):
        read_workflow(path, CLASSES)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InvalidInput, match=r"nowhere\.json: No such file"):
        read_workflow(tmp_path / "nowhere.json", CLASSES)


def test_settings_are_json_or_text():
    workflow = graph()
    for setting in ("1.seed=7", "2.mode=plain", '3.a=["2", 0]', "1.scale=0.5"):
        override(workflow, setting, CLASSES)
    assert workflow["1"]["inputs"] == {"seed": 7, "mode": "plain", "scale": 0.5}
    assert workflow["2"]["inputs"]["mode"] == "plain"
    assert workflow["3"]["inputs"]["a"] == ["2", 0]


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("8.seed=1", r"no node '8'; there are 1 \(Number\), 2"),
        ("1.sed=1", "no input 'sed'; it has seed, mode, scale"),
        ("seed", "not of the form"),
        ("1.seed", "not of the form"),
    ],
)
def test_a_setting_for_what_is_not_there_lists_what_is(setting, words):
    with pytest.raises(InvalidInput, match=words):
        override(graph(), setting, CLASSES)


# ---------------------------------------------------------------------- UI format


def ui_node(name: int, kind: str, widgets=(), links=None, **more):
    slots = [{"name": n, "type": "NUMBER", "link": link} for n, link in (links or {}).items()]
    return {"id": name, "type": kind, "widgets_values": list(widgets), "inputs": slots, "mode": 0, **more}


def ui_graph(*between):
    """Number -> `between`, a node 5 -> Show."""
    return {
        "nodes": [
            ui_node(1, "Number", [2, "randomize", "double", 0.5]),
            *between,
            ui_node(4, "Show", [3], {"number": 2}),
            ui_node(9, "Note", ["read me"]),
        ],
        "links": [[1, 1, 0, 5, 0, "NUMBER"], [2, 5 if between else 1, 0, 4, 0, "NUMBER"]],
    }


def test_widgets_are_read_in_their_order_without_the_seeds_companion():
    workflow = api_of(ui_graph(), CLASSES)
    assert workflow["1"]["inputs"] == {"seed": 2, "mode": "double", "scale": 0.5}
    assert workflow["4"]["inputs"] == {"limit": 3, "number": ["1", 0]}
    assert set(workflow) == {"1", "4"}


@pytest.mark.parametrize(
    "node",
    [ui_node(5, "Reroute", [], {"": 1}), ui_node(5, "Add", [], {"a": 1, "b": None}, mode=4)],
    ids=["reroute", "bypassed"],
)
def test_links_pass_through(node):
    assert api_of(ui_graph(node), CLASSES)["4"]["inputs"]["number"] == ["1", 0]


def test_a_muted_node_leaves_the_input_open():
    workflow = api_of(ui_graph(ui_node(5, "Add", [], {"a": 1}, mode=2)), CLASSES)
    assert "number" not in workflow["4"]["inputs"]
    assert problems_of(workflow) == [("required_input_missing", "4")]


def test_a_primitive_gives_its_value():
    workflow = api_of(ui_graph(ui_node(5, "PrimitiveNode", [7, "fixed"])), CLASSES)
    assert workflow["4"]["inputs"]["number"] == 7


def test_a_ui_node_that_is_not_known_is_named():
    with pytest.raises(InvalidInput, match="node 5: node type Subtract is not known here"):
        api_of(ui_graph(ui_node(5, "Subtract")), CLASSES)


@pytest.mark.parametrize("name", ["demo.json", "api/demo.json", "demo_lora.json", "demo_controlnet.json"])
def test_the_demo_in_both_formats_is_one_workflow(name):
    classes = node_classes()
    api = read_workflow(ROOT / "workflows" / "api" / name.removeprefix("api/"), classes).api
    assert read_workflow(ROOT / "workflows" / name, classes).api == api


# ---------------------------------------------------------------------- pictures


def test_pictures_are_numbered_and_carry_the_workflow(tmp_path):
    ui = {"nodes": [], "links": []}
    classes = {"SaveImage": stock_nodes.SaveImage, "Picture": Picture}
    workflow = {
        "1": {"class_type": "Picture", "inputs": {}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "sub/it"}},
    }
    for expected in ("it_00001_.png", "it_00002_.png"):
        (path,) = run(WorkflowFile(workflow, ui), Folders(tmp_path), classes).files
        assert path == tmp_path / "sub" / expected
    with Image.open(path) as image:
        assert json.loads(image.text["prompt"]) == workflow
        assert json.loads(image.text["workflow"]) == ui
        assert np.array(image)[0].tolist() == [[0, 127, 255], [255, 0, 0]]


class Picture:
    """One picture of 2 x 1 pixels, with values beyond the range."""

    RETURN_TYPES, FUNCTION = ("IMAGE",), "make"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    def make(self):
        return (torch.tensor([[[[0.0, 0.5, 1.0], [1.5, -0.5, 0.0]]]]),)


@pytest.mark.parametrize("prefix", ["../out", "/tmp/out"])
def test_a_prefix_does_not_lead_out_of_the_folder(tmp_path, prefix):
    with pytest.raises(InvalidInput, match="leads out of"):
        pictures.save(torch.zeros(1, 2, 2, 3), prefix, Folders(tmp_path / "output"), {}, {})
    assert list(tmp_path.iterdir()) == []


def test_a_picture_is_read_with_its_mask(tmp_path):
    levels = np.zeros((2, 3, 4), np.uint8)
    levels[..., 0], levels[0, :, 3] = 255, 255
    Image.fromarray(levels).save(tmp_path / "a.png")
    path = Folders(tmp_path, (tmp_path,)).find_input("a.png")
    pixels, mask = pictures.load(path)
    assert pixels.shape == (1, 2, 3, 3)
    assert pixels[0, 0, 0].tolist() == [1.0, 0.0, 0.0]
    assert mask[0].tolist() == [[0.0] * 3, [1.0] * 3]


def test_a_file_that_is_no_picture_is_refused(tmp_path):
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(InvalidInput, match="cannot be read as a picture"):
        pictures.load(tmp_path / "a.png")
    with pytest.raises(InvalidInput, match=r"no picture 'b\.png'"):
        Folders(tmp_path, (tmp_path,)).find_input("b.png")


def test_pictures_are_cropped_around_the_centre():
    pixels = torch.arange(19.0).expand(1, 17, 19)[..., None].expand(1, 17, 19, 3)
    cropped = pictures.cropped_to_multiple(pixels, 8)
    assert cropped.shape == (1, 16, 16, 3)
    assert cropped[0, 0, :, 0].tolist() == list(range(1, 17))
    with pytest.raises(InvalidInput, match="19x17"):
        pictures.cropped_to_multiple(pixels, 32)


def test_resizing_keeps_the_proportion_where_a_side_is_0():
    assert pictures.resized(torch.zeros(1, 10, 20, 3), "bilinear", 40, 0, crop=False).shape == (1, 20, 40, 3)
    image = torch.zeros(1, 4, 8, 3)
    image[:, :, 2:6] = 1.0
    assert pictures.resized(image, "bilinear", 4, 4, crop=True).min() == 1.0
