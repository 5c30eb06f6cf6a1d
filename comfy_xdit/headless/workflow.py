"""Runs a workflow without a ComfyUI server: the pack's nodes, stand-ins for stock ones, in their order."""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from tqdm import tqdm

from comfy_xdit import ROOT
from comfy_xdit.demo_files import DEMO
from comfy_xdit.headless import surroundings as headless
from comfy_xdit.headless.folders import Folders
from comfy_xdit.headless.format import WorkflowFile, override, read_workflow
from comfy_xdit.headless.stock_nodes import NODE_CLASS_MAPPINGS as STOCK
from comfy_xdit.headless.validation import Classes, Workflow, execution_order, is_link
from comfy_xdit.protocol.errors import InvalidInput, XDiTError
from comfy_xdit.ranks.timing import Timing, ledger

request_interrupt = headless.request_interrupt  # of a run here, e.g. by Ctrl-C
PACK_MODULE = "comfy_xdit_nodes"  # the root nodes.py; "nodes" is ComfyUI's own
Outputs = tuple[Any, ...]


class NodeFailed(XDiTError):
    """A node raised one of the pack's errors, which is the cause. The text names the node."""

    def __init__(self, node: str, class_type: str, cause: XDiTError):
        super().__init__(f"node {node} ({class_type}): {cause}")
        self.node, self.class_type = node, class_type


@dataclass(frozen=True)
class Finished:
    """What a run made: the outputs of every node that ran, the seconds each took, and the files.

    `calls` are those to the ranks, by node and kind of message.
    """

    outputs: dict[str, Outputs]
    seconds: dict[str, float]
    files: list[Path]
    calls: dict[str, dict[str, Timing]] = field(default_factory=dict)

    def timings(self) -> Iterator[str]:
        """Where the time went, in words."""
        for node, seconds in self.seconds.items():
            calls = self.calls[node]
            here = seconds - sum(timing.host for timing in calls.values())
            outside = f"{here:.2f} of it outside of calls to the ranks (their start, files)"
            yield f"node {node}: {seconds:.2f} s, {outside}"
            for kind, timing in calls.items():
                yield f"  {kind}: {timing.describe()}"


def check_writable(output: Path) -> None:
    """Make a folder for pictures, and raise InvalidInput unless a file can be written into it."""
    Folders(output).check_writable()


@cache
def node_classes() -> Classes:
    """Every node type known here, by name: the pack's and the stand-ins for stock ones.

    Raises:
        InvalidInput: the pack's nodes.py is not beside the package.
    """
    return {**STOCK, **_pack_classes()}


def run_file(
    path: Path,
    settings: tuple[str, ...] = (),
    output: Path = Path("output"),
    inputs: tuple[Path, ...] = (),
    quiet: bool = False,
) -> Finished:
    """Run a workflow file.

    Args:
        settings: `id.input=value` each, put into the workflow before it runs.
        output: folder for pictures; made when it is not there.
        inputs: folders where LoadImage looks, before the current one, the workflow's own and the demo's.
        quiet: show no progress.

    Raises:
        InvalidInput: the file, a setting or a value in the workflow cannot be used.
        NodeFailed: a node could not do its work; why is its `__cause__`.
    """
    classes = node_classes()
    workflow = read_workflow(path, classes)
    for setting in settings:
        override(workflow.api, setting, classes)
    folders = Folders(output, (*inputs, Path(), path.resolve().parent, DEMO))
    return run(workflow, folders, classes, quiet)


def run(workflow: WorkflowFile, folders: Folders, classes: Classes, quiet: bool = True) -> Finished:
    """Check a workflow, then run every node its outputs need, each once.

    Raises:
        InvalidWorkflow: with everything that is wrong; nothing ran.
        InvalidInput: nothing can be written to the output folder; nothing ran.
        NodeFailed: a node could not do its work; why is its `__cause__`.
        Interrupted: the person asked to stop between two nodes.
    """
    order = execution_order(workflow.api, classes)
    for node in order:
        _refuse_lists(classes[workflow.api[node]["class_type"]])
    hidden = {
        "PROMPT": workflow.api,
        "EXTRA_PNGINFO": {} if workflow.ui is None else {"workflow": workflow.ui},
        "FOLDERS": folders,
    }
    folders.check_writable()  # before hours of work, not after
    headless.forget_interrupt()
    finished = Finished({}, {}, folders.written)
    for node in order:
        headless.raise_if_interrupted()
        began = time.monotonic()
        with ledger.sums() as finished.calls[node]:
            finished.outputs[node] = _run_node(workflow.api, node, classes, hidden, finished.outputs, quiet)
        finished.seconds[node] = time.monotonic() - began
    return finished


def _run_node(
    workflow: Workflow,
    node: str,
    classes: Classes,
    hidden: dict[str, Any],
    outputs: dict[str, Outputs],
    quiet: bool,
) -> Outputs:
    import torch  # takes seconds, which a workflow that cannot run need not cost

    class_type = workflow[node]["class_type"]
    node_class = classes[class_type]
    arguments = _arguments(node_class, workflow[node]["inputs"], {**hidden, "UNIQUE_ID": node}, outputs)
    with tqdm(desc=f"{node} {class_type}", total=1, disable=quiet, file=sys.stderr, leave=True) as bar:

        def show(step: int, steps: int) -> None:
            bar.total, bar.n = steps, step
            bar.refresh()

        try:
            with headless.showing_steps(show), torch.inference_mode():
                answer = getattr(node_class(), node_class.FUNCTION)(**arguments)
                if inspect.iscoroutine(answer):
                    answer = asyncio.run(answer)
        except XDiTError as error:
            raise NodeFailed(node, class_type, error) from error
        bar.n = bar.total
    if isinstance(answer, dict):
        answer = answer.get("result", ())
    return tuple(answer or ())


def _arguments(
    node_class: type, inputs: dict[str, Any], hidden: dict[str, Any], outputs: dict[str, Outputs]
) -> dict[str, Any]:
    """What the node's function is called with: linked outputs, values, and what it asks for unseen."""
    declared = node_class.INPUT_TYPES()
    names = [*declared.get("required", {}), *declared.get("optional", {})]
    arguments = {
        name: outputs[str(inputs[name][0])][inputs[name][1]] if is_link(inputs[name]) else inputs[name]
        for name in names
        if name in inputs
    }
    for name, kind in declared.get("hidden", {}).items():
        kind = kind[0] if isinstance(kind, tuple) else kind
        arguments[name] = hidden.get(kind)
    return arguments


def _refuse_lists(node_class: type) -> None:
    if getattr(node_class, "INPUT_IS_LIST", False) or any(getattr(node_class, "OUTPUT_IS_LIST", ())):
        raise InvalidInput(
            f"node type {node_class.__name__} works on lists, which only ComfyUI runs; run it there."
        )


def _pack_classes() -> Classes:
    if PACK_MODULE not in sys.modules:
        path = ROOT / "nodes.py"
        if not path.is_file():
            raise InvalidInput(
                f"{path} is not there: workflows run from a checkout of comfy_xdit. Clone it, and "
                "install it with `pip install -e`."
            )
        spec = importlib.util.spec_from_file_location(PACK_MODULE, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[PACK_MODULE] = module
    return sys.modules[PACK_MODULE].NODE_CLASS_MAPPINGS
