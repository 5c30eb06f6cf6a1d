"""The packages the nodes need, and what stands in for a node while one is missing. Standard library only."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

from comfy_xdit import ROOT
from comfy_xdit.protocol.errors import XDiTError

# What is imported under which name, and what pip calls it.
NEEDED = {
    "torch": "torch",
    "safetensors": "safetensors",
    "numpy": "numpy",
    "PIL": "pillow",
    "diffusers": "diffusers",
    "transformers": "transformers",
    "accelerate": "accelerate",
    "xfuser": "xfuser",
}


def missing_packages() -> list[str]:
    """What pip has to install before the nodes can work."""
    return [pip for name, pip in NEEDED.items() if importlib.util.find_spec(name) is None]


def install(missing: list[str]) -> str:
    """The command that installs it. The requirements leave out torch, which no pack may replace."""
    torch = "torch " if "torch" in missing else ""
    return f"{sys.executable} -m pip install {torch}-r {ROOT / 'requirements.txt'}"


def unavailable(node: type, missing: list[str]) -> type:
    """A node of the same name and outputs that says what is missing when it is executed."""
    text = f"comfy_xdit needs {', '.join(missing)}, not installed in this Python. Run: {install(missing)}"

    def explain(self: Any, **_: Any) -> None:
        raise XDiTError(text)

    inputs = classmethod(lambda cls: {"required": {}})
    return type(node.__name__, (node,), {"INPUT_TYPES": inputs, node.FUNCTION: explain})
