"""What ComfyUI's /prompt checks before anything runs, with its error types, for an API workflow.

One difference: where one of several outputs is wrong, ComfyUI draws the others; here nothing runs.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from comfy_xdit.protocol.errors import InvalidInput

Workflow = dict[str, dict[str, Any]]
Classes = Mapping[str, type]
LISTED = 20  # longer lists of choices are not written out, as in ComfyUI
SHOWN = 100  # characters of a value in a message
_CONVERSIONS = {"INT": int, "FLOAT": float, "STRING": str, "BOOLEAN": bool}


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong. `kind` is ComfyUI's error type, e.g. "value_not_in_list"."""

    kind: str
    text: str
    node: str = ""
    class_type: str = ""

    def __str__(self) -> str:
        place = f"node {self.node}" if self.node else "workflow"
        place += f" ({self.class_type})" if self.class_type else ""
        return f"{place}: {self.text} [{self.kind}]"


class InvalidWorkflow(InvalidInput):
    """The workflow cannot run. `problems` has every reason, the text one line for each."""

    def __init__(self, problems: list[Problem]):
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = problems


@dataclass(frozen=True)
class InputField:
    """One input of a node class as INPUT_TYPES declares it. `type` is a name, or a list of choices."""

    name: str
    type: Any
    options: dict[str, Any]
    required: bool

    @property
    def choices(self) -> list[Any] | None:
        """The values of a drop-down; None for any other input."""
        if isinstance(self.type, (list, tuple)):
            return self.type
        return self.options.get("options", []) if self.type == "COMBO" else None

    @property
    def needs_link(self) -> bool:
        """Can only another node give it? Wildcard types, whose `!=` is false, take anything."""
        return (
            isinstance(self.type, str)
            and self.choices is None
            and self.type not in _CONVERSIONS
            and (self.type != "*")
        )

    @property
    def is_widget(self) -> bool:
        """Does the person type or choose it on the node (rather than link it)?"""
        typed = self.type in _CONVERSIONS if isinstance(self.type, str) else False
        return (typed or self.choices is not None) and not self.options.get("forceInput", False)


def input_fields(node_class: type) -> list[InputField]:
    """The inputs of a node class, in the order of its widgets and sockets."""
    declared = node_class.INPUT_TYPES()
    return [
        InputField(name, entry[0], entry[1] if len(entry) > 1 else {}, section == "required")
        for section in ("required", "optional")
        for name, entry in declared.get(section, {}).items()
    ]


def is_link(value: Any) -> bool:
    """Is this input a link, [node id, output slot], rather than a value?"""
    return isinstance(value, list)


def execution_order(workflow: Workflow, classes: Classes) -> list[str]:
    """Check the workflow and return the nodes its outputs need, each after those it depends on.

    Values are converted in place to what the widget holds, as ComfyUI does ("20" for an INT is 20).

    Raises:
        InvalidWorkflow: with everything that is wrong.
    """
    _check_nodes(workflow, classes)
    outputs = [n for n in workflow if getattr(classes[workflow[n]["class_type"]], "OUTPUT_NODE", False)]
    if not outputs:
        raise InvalidWorkflow(
            [Problem("prompt_no_outputs", "nothing is saved or shown; add a node such as SaveImage")]
        )
    order = _in_order(workflow, outputs)
    problems = [p for node in order for p in _node_problems(workflow, node, classes)]
    if problems:
        raise InvalidWorkflow(problems)
    return order


def _check_nodes(workflow: Workflow, classes: Classes) -> None:
    problems = []
    for name, node in workflow.items():
        if not isinstance(node, dict) or "class_type" not in node:
            problems.append(Problem("invalid_prompt", "it has no class_type", name))
        elif not isinstance(node["class_type"], str):
            text = f"its class_type is {shown(node['class_type'])}, which is no name of a node type"
            problems.append(Problem("invalid_prompt", text, name))
        elif node["class_type"] not in classes:
            text = f"node type {node['class_type']} is not known here; known are {', '.join(sorted(classes))}"
            problems.append(Problem("invalid_prompt", text, name, node["class_type"]))
        elif not isinstance(node.get("inputs"), dict):
            text = "its inputs are no names with values"
            problems.append(Problem("invalid_prompt", text, name, node["class_type"]))
    if problems:
        raise InvalidWorkflow(problems)


def _linked_nodes(workflow: Workflow, node: str) -> Iterator[str]:
    for value in workflow[node]["inputs"].values():
        if is_link(value) and len(value) == 2 and str(value[0]) in workflow:
            yield str(value[0])


def _in_order(workflow: Workflow, outputs: list[str]) -> list[str]:
    """The nodes that `outputs` need, each after those it depends on. Chains may be of any length."""
    done: dict[str, None] = {}
    for output in outputs:
        path = {output: _linked_nodes(workflow, output)}  # nodes that wait, and what else each waits for
        while path:
            node, sources = next(reversed(path.items()))
            source = next((source for source in sources if source not in done), None)
            if source is None:
                del path[node]
                done[node] = None
            elif source in path:
                names = list(path)
                circle = " -> ".join([*names[names.index(source) :], source])
                raise InvalidWorkflow(
                    [Problem("dependency_cycle", f"the nodes {circle} wait for each other", source)]
                )
            else:
                path[source] = _linked_nodes(workflow, source)
    return list(done)


def _node_problems(workflow: Workflow, node: str, classes: Classes) -> list[Problem]:
    class_type, inputs = workflow[node]["class_type"], workflow[node]["inputs"]
    node_class = classes[class_type]
    own_check = getattr(node_class, "VALIDATE_INPUTS", None)
    argspec = inspect.getfullargspec(own_check) if own_check is not None else None
    found: list[tuple[str, str]] = []
    received: dict[str, Any] = {}
    for field in input_fields(node_class):
        if field.name not in inputs:
            if field.required:
                found.append(("required_input_missing", f"required input {field.name} is missing"))
            continue
        if is_link(inputs[field.name]):
            found += _link_problems(workflow, inputs[field.name], field, classes, received, argspec)
            continue
        problem = _unlinked(inputs[field.name], field) or _convert(inputs, field)
        if problem is None and not _checks_itself(argspec, field.name):
            problem = _range_problem(inputs[field.name], field)
        found += [problem] if problem else []
    if not found and own_check is not None:
        found = _own_problems(own_check, argspec, inputs, received)
    return [Problem(kind, text, node, class_type) for kind, text in found]


def _checks_itself(argspec: inspect.FullArgSpec | None, name: str) -> bool:
    return argspec is not None and (name in argspec.args or argspec.varkw is not None)


def _link_problems(
    workflow: Workflow,
    link: list[Any],
    field: InputField,
    classes: Classes,
    received: dict[str, Any],
    argspec: inspect.FullArgSpec | None,
) -> list[tuple[str, str]]:
    """What is wrong with the link at `field`; notes the type that arrives in `received`."""
    if len(link) != 2 or not isinstance(link[1], int):
        return [("bad_linked_input", f"{field.name} is {shown(link)}; a link is [node id, output slot]")]
    source, slot = str(link[0]), link[1]
    if source not in workflow:
        return [("bad_linked_input", f"{field.name} is linked to node {source}, which is not there")]
    types = classes[workflow[source]["class_type"]].RETURN_TYPES
    if not 0 <= slot < len(types):
        text = f"{field.name} is linked to output {slot} of node {source}, which has {len(types)}"
        return [("bad_linked_input", text)]
    received[field.name] = types[slot]
    takes_any = argspec is not None and "input_types" in argspec.args
    if takes_any or _types_fit(types[slot], field.type):
        return []
    text = f"{field.name} takes {field.type}, node {source} gives {types[slot]}"
    return [("return_type_mismatch", text)]


def _types_fit(given: Any, taken: Any) -> bool:
    # Wildcard types of node packs are strings whose `!=` is always false; their `==` is not changed.
    if not given != taken:  # noqa: SIM202
        return True
    if not isinstance(given, str) or not isinstance(taken, str):
        return False
    return bool({t.strip() for t in given.split(",")} & {t.strip() for t in taken.split(",")})


def _unlinked(value: Any, field: InputField) -> tuple[str, str] | None:
    """What is wrong with a value at a socket that takes links alone; nothing (null) may be optional."""
    if not field.needs_link or (value is None and not field.required):
        return None
    return (
        "invalid_input_type",
        f"{field.name} is {shown(value)}; it takes {field.type} from another node: link it to one",
    )


def shown(value: Any) -> str:
    """A value for a message: on one line, and short."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _convert(inputs: dict[str, Any], field: InputField) -> tuple[str, str] | None:
    """Convert the value at `field` in place to its type."""
    value = inputs[field.name]
    if isinstance(value, dict) and "__value__" in value:  # ComfyUI's way to write a list that is no link
        value = inputs[field.name] = value["__value__"]
    if not isinstance(field.type, str) or field.type not in _CONVERSIONS:
        return None
    try:
        converted = _CONVERSIONS[field.type](value)
    except (TypeError, ValueError, OverflowError):
        return "invalid_input_type", f"{field.name} is {shown(value)}, which is no {field.type}"
    if isinstance(converted, float) and not math.isfinite(converted):
        return "invalid_input_type", f"{field.name} is {shown(value)}, which is no finite number"
    inputs[field.name] = converted
    return None


def _range_problem(value: Any, field: InputField) -> tuple[str, str] | None:
    low, high, choices = field.options.get("min"), field.options.get("max"), field.choices
    if low is not None and value < low:
        return "value_smaller_than_min", f"{field.name} is {value}, at least {low} is possible"
    if high is not None and value > high:
        return "value_bigger_than_max", f"{field.name} is {value}, at most {high} is possible"
    if choices is not None and value not in choices:
        named = ", ".join(map(str, choices)) if len(choices) <= LISTED else f"{len(choices)} choices"
        if not named:
            return "value_not_in_list", f"{field.name} is {shown(value)}, but there is nothing to choose from"
        return "value_not_in_list", f"{field.name} is {shown(value)}, not one of: {named}"
    return None


def _own_problems(
    check: Any, argspec: inspect.FullArgSpec, inputs: dict[str, Any], received: dict[str, Any]
) -> list[tuple[str, str]]:
    """What the node's VALIDATE_INPUTS says about the values that are not linked."""
    values = {n: v for n, v in inputs.items() if not is_link(v) and _checks_itself(argspec, n)}
    if "input_types" in argspec.args:
        values["input_types"] = received
    answer = check(**values)
    if answer is True:
        return []
    text = f"{', '.join(values)}: {answer}" if isinstance(answer, str) else ", ".join(values)
    return [("custom_validation_failed", text)]
