"""Refuses to build a wheel: it would hold a part of the pack only. All else stands in pyproject.toml.

A wheel puts its packages beside everybody else's, and `worker` and `nodes` are no names to claim there; and
workflows, the demo's models and the page are files that ComfyUI looks for in a folder of custom_nodes.
"""

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel

WHY = (
    "comfy_xdit is a folder of ComfyUI's custom_nodes and no package: a wheel would lack ranks, nodes and "
    "workflows. Clone https://github.com/comfy-xdit/comfy_xdit into ComfyUI/custom_nodes and run: "
    "python -m pip install -r comfy_xdit/requirements.txt (for the command comfy-xdit: pip install -e .)."
)


class Refused(bdist_wheel):
    """`pip wheel .` and `pip install .`; an editable installation does not come here."""

    def run(self) -> None:
        """Say what to do instead."""
        raise SystemExit(WHY)


setup(cmdclass={"bdist_wheel": Refused})
