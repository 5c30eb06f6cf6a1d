"""Writes locales/en/nodeDefs.json from what the nodes say, in the form that ComfyUI's page reads.

`python -m scripts.write_locales`, after a node was added or its texts changed. Other languages are written by
hand beside it, with the same keys; what they lack is shown in English.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from comfy_xdit import ROOT
from comfy_xdit.headless.validation import Classes
from comfy_xdit.headless.workflow import node_classes

LOCALES = ROOT / "locales"
FILE = "nodeDefs.json"


def pack_nodes() -> Classes:
    """The pack's own node classes, by name."""
    return {name: node for name, node in node_classes().items() if name.startswith("XDiT")}


def definitions() -> dict[str, Any]:
    """By node: display_name, description, and of each input its name and tooltip."""
    return {name: _definition(node) for name, node in pack_nodes().items()}


def text(content: dict[str, Any]) -> str:
    """As the files hold it."""
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def _definition(node: type) -> dict[str, Any]:
    inputs = {}
    declared = node.INPUT_TYPES()
    for name, (_, *options) in {**declared.get("required", {}), **declared.get("optional", {})}.items():
        tooltip = options[0].get("tooltip") if options else None
        inputs[name] = {"name": name} | ({"tooltip": tooltip} if tooltip else {})
    names = getattr(node, "RETURN_NAMES", node.RETURN_TYPES)
    outputs = {str(number): {"name": name} for number, name in enumerate(names)}
    return {
        "display_name": node.TITLE,
        "description": node.DESCRIPTION,
        "inputs": inputs,
        "outputs": outputs,
    }


def main(folder: Path = LOCALES) -> None:
    """Write the English file."""
    (folder / "en").mkdir(parents=True, exist_ok=True)
    (folder / "en" / FILE).write_text(text(definitions()), encoding="utf-8")


if __name__ == "__main__":
    main()
