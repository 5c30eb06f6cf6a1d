"""Reads a workflow file: API format as it is, UI format (what ComfyUI saves) turned into API format."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comfy_xdit.headless.validation import Classes, Workflow, input_fields
from comfy_xdit.protocol.errors import InvalidInput

MUTED, BYPASSED = 2, 4
COMMENTS = ("Note", "MarkdownNote")
AFTER_GENERATE = ("fixed", "increment", "decrement", "randomize")


@dataclass(frozen=True)
class WorkflowFile:
    """`api` is what runs; `ui` is the picture of the graph, when the file has one."""

    api: Workflow
    ui: dict[str, Any] | None = None


def read_workflow(path: Path, classes: Classes) -> WorkflowFile:
    """Read an API or UI workflow from a JSON file.

    Raises:
        InvalidInput: there is no such file, it is no JSON, or no workflow, or a UI workflow with a
            node type that is not known here.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidInput(f"cannot read {path}: {error.strerror}; name a workflow file.") from error
    except ValueError as error:
        raise InvalidInput(f"{path} is not JSON: {error}; save the workflow anew from ComfyUI.") from error
    if isinstance(content, dict) and isinstance(content.get("nodes"), list):
        return WorkflowFile(api_of(content, classes), content)
    if isinstance(content, dict) and isinstance(content.get("prompt"), dict):
        content = content["prompt"]
    if not isinstance(content, dict) or not any(
        isinstance(node, dict) and "class_type" in node for node in content.values()
    ):
        raise InvalidInput(
            f"{path} is no ComfyUI workflow: it has neither `nodes` (UI format) nor nodes with a "
            "`class_type` (API format)."
        )
    return WorkflowFile(content)


def override(workflow: Workflow, setting: str, classes: Classes) -> None:
    """Apply one `id.input=value` in place. The value is JSON, or else taken as text.

    Raises:
        InvalidInput: no such form, node or input; the text lists what there is.
    """
    target, equals, text = setting.partition("=")
    node, dot, name = target.partition(".")
    if not (equals and dot and name):
        raise InvalidInput(
            f"--set {setting!r} is not of the form id.input=value, e.g. 6.text='a red circle'."
        )
    if node not in workflow:
        there = ", ".join(f"{n} ({workflow[n].get('class_type')})" for n in workflow)
        raise InvalidInput(f"--set {setting!r}: no node {node!r}; there are {there}.")
    inputs = workflow[node].setdefault("inputs", {})
    node_class = classes.get(workflow[node].get("class_type", ""))
    known = list(inputs) if node_class is None else [f.name for f in input_fields(node_class)]
    if name not in known:
        raise InvalidInput(
            f"--set {setting!r}: node {node} has no input {name!r}; it has {', '.join(known)}."
        )
    try:
        inputs[name] = json.loads(text)
    except ValueError:
        inputs[name] = text


def api_of(ui: dict[str, Any], classes: Classes) -> Workflow:
    """API format of a UI-format workflow: the frontend's `graphToPrompt` for known nodes.

    Raises:
        InvalidInput: a node type is not known here, or the file is damaged.
    """
    graph = _Graph(ui)
    workflow: Workflow = {}
    for name, node in graph.nodes.items():
        if node["type"] in (*COMMENTS, "Reroute", "PrimitiveNode") or node.get("mode") in (MUTED, BYPASSED):
            continue
        if node["type"] not in classes:
            raise InvalidInput(
                f"node {name}: node type {node['type']} is not known here; known are "
                f"{', '.join(sorted(classes))}. Run this workflow in ComfyUI."
            )
        inputs = _widget_values(node, classes[node["type"]])
        for slot in node.get("inputs") or []:
            if slot.get("link") is not None:
                graph.connect(inputs, slot["name"], slot["link"])
        workflow[name] = {"class_type": node["type"], "inputs": inputs}
        if node.get("title"):
            workflow[name]["_meta"] = {"title": node["title"]}
    return workflow


def _widget_values(node: dict[str, Any], node_class: type) -> dict[str, Any]:
    """Values of the widgets, which the file stores in the order of the inputs, without names."""
    stored = node.get("widgets_values") or []
    if isinstance(stored, dict):
        return {f.name: stored[f.name] for f in input_fields(node_class) if f.name in stored}
    values, remaining = {}, list(stored)
    for field in input_fields(node_class):
        if not field.is_widget:
            continue
        if not remaining:
            if "default" in field.options:
                values[field.name] = field.options["default"]
            continue
        values[field.name] = remaining.pop(0)
        steered = field.name in ("seed", "noise_seed") or field.options.get("control_after_generate")
        if steered and remaining and remaining[0] in AFTER_GENERATE:
            remaining.pop(0)
    return values


class _Graph:
    """The nodes and links of a UI workflow."""

    def __init__(self, ui: dict[str, Any]):
        self.nodes: dict[str, dict[str, Any]] = {}
        for node in ui["nodes"]:
            if not isinstance(node, dict) or "id" not in node or "type" not in node:
                raise InvalidInput("a node of the workflow has no id or no type; save it anew from ComfyUI.")
            self.nodes[str(node["id"])] = node
        self.links: dict[Any, tuple[str, int, str]] = {}
        for link in ui.get("links") or []:
            if isinstance(link, dict):
                link = [
                    link.get("id"),
                    link.get("origin_id"),
                    link.get("origin_slot"),
                    0,
                    0,
                    link.get("type"),
                ]
            if not isinstance(link, list) or len(link) < 6:
                raise InvalidInput(f"link {link!r} of the workflow is damaged; save it anew from ComfyUI.")
            self.links[link[0]] = (str(link[1]), link[2], link[5])

    def connect(self, inputs: dict[str, Any], name: str, link: Any) -> None:
        """Set input `name` to what `link` leads to; leave it alone where that is a muted node."""
        seen = set()
        while link is not None and link not in seen:
            seen.add(link)
            if link not in self.links or self.links[link][0] not in self.nodes:
                raise InvalidInput(f"link {link} at input {name} leads nowhere; save the workflow anew.")
            source, slot, kind = self.links[link]
            node = self.nodes[source]
            if node["type"] == "PrimitiveNode":
                inputs[name] = (node.get("widgets_values") or [None])[0]
                return
            if node.get("mode") == MUTED:
                return
            if node["type"] != "Reroute" and node.get("mode") != BYPASSED:
                inputs[name] = [source, slot]
                return
            link = _passed_through(node, slot, kind)


def _passed_through(node: dict[str, Any], slot: int, kind: str) -> Any:
    """The link at the input that a reroute or a bypassed node hands on to its output `slot`."""
    slots = node.get("inputs") or []
    if node["type"] == "Reroute":
        return slots[0].get("link") if slots else None
    fitting = [s for s in slots if s.get("type") == kind]
    if slot < len(slots) and slots[slot] in fitting:
        return slots[slot].get("link")
    return fitting[0].get("link") if fitting else None
