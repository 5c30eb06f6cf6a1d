"""XDiTStatus: what runs in the ranks."""

from __future__ import annotations

from typing import Any

from comfy_xdit.nodes.surroundings import surroundings


class _Anything(str):
    """A socket type that every link fits: ComfyUI and the headless runner ask by `!=`."""

    def __ne__(self, _other: object) -> bool:
        return False

    __hash__ = str.__hash__


class XDiTStatus:
    """What runs in the ranks."""

    TITLE = "xDiT Status"
    DESCRIPTION = (
        "Says what the ranks run on and hold, how long their last work took, and the bridge's bytes."
    )
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("report",)
    FUNCTION = "report"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Nothing that is needed."""
        after = {"tooltip": "Anything: the report is made when it is there, e.g. after a sampler."}
        return {"required": {}, "optional": {"after": (_Anything("*"), after)}}

    @classmethod
    def IS_CHANGED(cls, **_: Any) -> float:
        """Never the same twice."""
        return float("nan")

    def report(self, after: Any = None) -> dict[str, Any]:
        """Ask the ranks; the report is shown on the node's output and in the run's history."""
        from comfy_xdit.nodes.report import report

        text = report(surroundings().self_check())
        return {"ui": {"text": [text]}, "result": (text,)}
