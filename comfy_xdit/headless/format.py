"""Reads a workflow file: API format as it is, UI format (what ComfyUI saves) turned into API format."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comfy_xdit.headless.validation import Classes, Workflow, input_fields, shown
from comfy_xdit.protocol.errors import InvalidInput

MAX_BYTES = 64 << 20  # of a workflow; large ones have a few
MAX_DEPTH = 100
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
        with path.open("rb") as stream:  # a FIFO, too: the shell's <( )
            text = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise InvalidInput(f"cannot read {path}: {error.strerror}; name a workflow file.") from error
    if len(text) > MAX_BYTES:
        raise InvalidInput(f"{path} has more than {MAX_BYTES:,} bytes; no workflow has: name another file.")
    try:
        content = _plain(json.loads(text))
    except (ValueError, RecursionError) as error:
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
            "`class_type` (API format); save or export it anew from ComfyUI."
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
    nodes = {n: content for n, content in workflow.items() if isinstance(content, dict)}
    if node not in nodes:
        there = ", ".join(f"{n} ({content.get('class_type')})" for n, content in nodes.items())
        raise InvalidInput(f"--set {setting!r}: no node {node!r}; there are {there}: name one of them.")
    inputs = nodes[node].setdefault("inputs", {})
    if not isinstance(inputs, dict):
        raise InvalidInput(
            f"--set {setting!r}: the inputs of node {node} are no names with values; save it anew."
        )
    class_type = nodes[node].get("class_type")
    node_class = classes.get(class_type) if isinstance(class_type, str) else None
    known = list(inputs) if node_class is None else [f.name for f in input_fields(node_class)]
    if name not in known:
        raise InvalidInput(
            f"--set {setting!r}: node {node} has no input {name!r}; it has {', '.join(known)}: name one."
        )
    try:
        inputs[name] = _plain(json.loads(text))
    except (ValueError, RecursionError):
        inputs[name] = text


def _plain(content: Any) -> Any:
    """What was read, unless it is nested deeper, or holds another text, than anything can use.

    Raises:
        ValueError: it does.
    """
    rest = [(content, 0)]
    while rest:
        value, depth = rest.pop()
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
        if isinstance(value, str):
            value.encode()  # half of a surrogate pair
        elif isinstance(value, dict):
            rest += [(part, depth + 1) for pair in value.items() for part in pair]
        elif isinstance(value, list):
            rest += [(part, depth + 1) for part in value]
    return content


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
        for slot in _slots(node):
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


def _slots(node: dict[str, Any]) -> list[dict[str, Any]]:
    """The inputs of a node in a UI workflow."""
    return node.get("inputs") or []


def _check_node(node: Any) -> None:
    """Raise InvalidInput unless what is read of a node has the form that ComfyUI writes."""
    anew = "save it anew from ComfyUI"
    if not isinstance(node, dict) or not _is_id(node.get("id")) or not isinstance(node.get("type"), str):
        raise InvalidInput(f"a node of the workflow has no id or no type; {anew}.")
    slots = _slots(node)
    if not isinstance(slots, list) or not all(
        isinstance(slot, dict)
        and isinstance(slot.get("name"), str)
        and (slot.get("link") is None or _is_id(slot["link"]))
        for slot in slots
    ):
        raise InvalidInput(f"the inputs of node {node['id']} of the workflow are damaged; {anew}.")
    if not isinstance(node.get("widgets_values") or [], (list, dict)):
        raise InvalidInput(f"the values of node {node['id']} of the workflow are damaged; {anew}.")


def _check_link(link: Any) -> list[Any]:
    """[id, origin node, origin slot, ...] of a link in either of ComfyUI's forms.

    Raises:
        InvalidInput: it has another.
    """
    keys = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    parts = [link.get(key) for key in keys] if isinstance(link, dict) else link
    whole = isinstance(parts, list) and len(parts) >= len(keys)
    if not whole or not _is_id(parts[0]) or not _is_id(parts[1]) or type(parts[2]) is not int:
        raise InvalidInput(f"link {shown(link)} of the workflow is damaged; save it anew from ComfyUI.")
    return parts


def _is_id(value: Any) -> bool:
    return type(value) in (int, str)


class _Graph:
    """The nodes and links of a UI workflow."""

    def __init__(self, ui: dict[str, Any]):
        self.nodes: dict[str, dict[str, Any]] = {}
        for node in ui["nodes"]:
            _check_node(node)
            self.nodes[str(node["id"])] = node
        links = ui.get("links") or []
        if not isinstance(links, list):
            raise InvalidInput("the links of the workflow are damaged; save it anew from ComfyUI.")
        self.links: dict[Any, tuple[str, int, str]] = {}
        for parts in map(_check_link, links):
            self.links[parts[0]] = (str(parts[1]), parts[2], parts[5])

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
                inputs[name] = _first_value(node)
                return
            if node.get("mode") == MUTED:
                return
            if node["type"] != "Reroute" and node.get("mode") != BYPASSED:
                inputs[name] = [source, slot]
                return
            link = _passed_through(node, slot, kind)


def _first_value(node: dict[str, Any]) -> Any:
    stored = node.get("widgets_values") or [None]
    return next(iter(stored.values())) if isinstance(stored, dict) else stored[0]


def _passed_through(node: dict[str, Any], slot: int, kind: str) -> Any:
    """The link at the input that a reroute or a bypassed node hands on to its output `slot`."""
    slots = _slots(node)
    if node["type"] == "Reroute":
        return slots[0].get("link") if slots else None
    fitting = [s for s in slots if s.get("type") == kind]
    if 0 <= slot < len(slots) and slots[slot] in fitting:
        return slots[slot].get("link")
    return fitting[0].get("link") if fitting else None
