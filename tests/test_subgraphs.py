"""The subgraph blueprints name nodes, widgets and links that there are."""

from __future__ import annotations

import json
from typing import Any

import pytest

from comfy_xdit.headless.validation import input_fields
from comfy_xdit.headless.workflow import node_classes
from comfy_xdit.ranks.environment import ROOT

FILES = sorted((ROOT / "subgraphs").glob("*.json"))  # where ComfyUI looks for them


def subgraph(content: dict[str, Any]) -> dict[str, Any]:
    (found,) = content["definitions"]["subgraphs"]
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_blueprint_is_as_the_nodes_are(file):
    content = json.loads(file.read_text())
    (node,) = content["nodes"]
    inner = subgraph(content)
    assert node["type"] == inner["id"] and inner["name"] == file.stem
    nodes = {inside["id"]: inside for inside in inner["nodes"]}
    for inside in nodes.values():
        widgets = [field.name for field in input_fields(node_classes()[inside["type"]]) if field.is_widget]
        assert [slot["name"] for slot in inside["inputs"] if "widget" in slot] == widgets
        assert len(inside["widgets_values"]) == len(widgets)
    for owner, name in node["properties"]["proxyWidgets"]:
        assert name in [slot["name"] for slot in nodes[int(owner)]["inputs"] if "widget" in slot]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_its_links_join_sockets_of_their_type(file):
    inner = subgraph(json.loads(file.read_text()))
    nodes = {inside["id"]: inside for inside in inner["nodes"]}
    ends = {inner["outputNode"]["id"]: {"inputs": inner["outputs"]}}
    for link in inner["links"]:
        given = nodes[link["origin_id"]]["outputs"][link["origin_slot"]]
        taken = {**nodes, **ends}[link["target_id"]]["inputs"][link["target_slot"]]
        assert given["type"] == taken["type"] == link["type"]
        assert link["id"] in given["links"]
        assert link["id"] in taken.get("linkIds", [taken.get("link")])


def test_there_is_one():
    assert FILES
