"""Looks at this Python, machine and ComfyUI: what the pack needs, what is there, do ranks start."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from comfy_xdit import ROOT
from comfy_xdit.planning.command import GIB, outline, this_machine
from comfy_xdit.protocol.errors import InvalidInput, XDiTError
from comfy_xdit.protocol.installed_in import is_comfyui, own_comfyui

REQUIREMENTS = ROOT / "requirements.txt"
TORCH = "torch>=2.8"  # in no requirements file: a pack must never replace the torch a ComfyUI has
SELF_CHECK_SECONDS = 120.0
MARKS = {"ok": "ok", "note": "--", "bad": "!!"}  # by level, as the report begins its lines
# In a process of its own: importing ComfyUI sets up devices, logging and names like `nodes`.
_SELF_CHECK = """
import comfy.cli_args, torch
comfy.cli_args.args.cpu = not torch.cuda.is_available()
from comfy_xdit.comfy_types.contract import findings
print(*("finding: " + sentence for sentence in findings()), "end", sep="\\n")
"""
_REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)\s*([^#;]*)")
_BOUND = re.compile(r"(>=|<=|==|<|>)\s*([0-9][0-9.]*)")
_COMPARISONS = {
    ">=": lambda have, limit: have >= limit,
    "<=": lambda have, limit: have <= limit,
    "==": lambda have, limit: have[: len(limit)] == limit,
    "<": lambda have, limit: have < limit,
    ">": lambda have, limit: have > limit,
}


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Args:
        level: ok; note, for what costs speed or was not looked at; bad, for what keeps the pack from working.
        remedy: what the person can do about it.
    """

    text: str
    level: str = "ok"
    remedy: str = ""

    @property
    def fine(self) -> bool:
        """Whether the pack works all the same."""
        return self.level != "bad"

    def __str__(self) -> str:
        remedy = f"\n     {self.remedy}" if self.remedy else ""
        return f"[{MARKS[self.level]}] {self.text}{remedy}"


def examine(comfyui: Path | None = None) -> Iterator[Finding]:
    """Findings in the order a person would look: Python, packages, devices, ranks, ComfyUI.

    Args:
        comfyui: folder of the ComfyUI to look at; None for the one this pack is installed in.
    """
    yield Finding(f"Python {platform.python_version()} at {sys.executable}")
    packages = [package_finding(line) for line in [TORCH, *_requirement_lines()]]
    yield from packages
    if not all(package.fine for package in packages):
        return  # ranks cannot start; what to do is said already
    yield from device_findings()
    yield rank_finding()
    yield from comfyui_findings(comfyui or own_comfyui())


def comfyui_findings(folder: Path | None) -> Iterator[Finding]:
    """Does this ComfyUI do what the pack relies on? One finding for each point where it does not."""
    if folder is None:
        where = f"{ROOT} is in no ComfyUI's custom_nodes, or ComfyUI itself is elsewhere (--base-directory)"
        yield Finding(f"no ComfyUI was looked at: {where}", "note", "Name its folder: --comfyui FOLDER")
        return
    if not is_comfyui(folder):
        yield Finding(
            f"{folder} is no ComfyUI: it has no folder comfy with a comfyui_version.py beside it",
            "bad",
            "Name the folder that main.py of ComfyUI is in: --comfyui FOLDER",
        )
        return
    path = os.pathsep.join(
        [str(folder), str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    )
    done = subprocess.run(
        [sys.executable, "-c", _SELF_CHECK],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=SELF_CHECK_SECONDS,
    )
    lines = done.stdout.splitlines()
    if done.returncode or "end" not in lines:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        yield Finding(
            f"ComfyUI in {folder} could not be looked at: {last}",
            "bad",
            f"Run this with the Python that starts ComfyUI; this one is {sys.executable}",
        )
        return
    changed = [line.removeprefix("finding: ") for line in lines if line.startswith("finding: ")]
    for sentence in changed:
        yield Finding(
            f"this ComfyUI differs from those known: {sentence}",
            "bad",
            "Update comfy_xdit; if it is the newest, report this sentence as an issue",
        )
    if not changed:
        yield Finding(f"ComfyUI in {folder} is as this pack knows it")


def package_finding(requirement: str) -> Finding:
    """Is the package of a line such as "xfuser>=0.7.0,<0.8" installed, in that version?"""
    name, bounds = _REQUIREMENT.match(requirement).groups()
    command = f"Run: {sys.executable} -m pip install '{requirement}'"
    try:
        installed = version(name)
    except PackageNotFoundError:
        return Finding(f"{name} is not installed", "bad", command)
    unmet = [
        f"{sign}{limit}"
        for sign, limit in _BOUND.findall(bounds)
        if not _COMPARISONS[sign](_numbers(installed), _numbers(limit))
    ]
    if unmet:
        return Finding(f"{name} is {installed}, needed is {', '.join(unmet)}", "bad", command)
    return Finding(f"{name} {installed}")


def device_findings() -> Iterator[Finding]:
    """The devices ranks can be put on."""
    import torch

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            yield Finding(f"cuda:{index} {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    else:
        yield _no_gpu(torch.version.cuda or torch.version.hip)
    where = this_machine()
    yield Finding(f"the planner sees {where.describe()}, {where.device.memory / GIB:.1f} GiB for each")
    yield from (Finding(line, "ok" if fits else "note") for line, fits in outline(where))


def _no_gpu(built_for: str | None) -> Finding:
    """Ranks on the CPU are right, and far too slow for a published model."""
    built = "is built without CUDA" if built_for is None else f"is built for CUDA or ROCm {built_for}"
    return Finding(
        f"no GPU (torch {built}): ranks run on the CPU, {os.cpu_count()} cores",
        "note",
        "With a GPU in this machine: install a torch that is built for it, as pytorch.org says"
        if built_for is None
        else "With a GPU in this machine: look at its driver (nvidia-smi) and CUDA_VISIBLE_DEVICES",
    )


def rank_finding() -> Finding:
    """Does a rank start, and how long does that take?"""
    from comfy_xdit.protocol.messages import Load
    from comfy_xdit.protocol.parallel import ParallelConfig
    from comfy_xdit.protocol.spec import ModelSpec
    from comfy_xdit.ranks.group import WorkerGroup

    group = WorkerGroup(ParallelConfig())
    try:
        # A group starts at its first call. This one names nothing that can be loaded, and a rank
        # that refuses it has started.
        group.call(Load(ModelSpec(path="", kind="none")))
    except InvalidInput:
        return Finding(f"a rank started in {group.start_seconds:.1f} s: {group.reports[0]['device']}")
    except XDiTError as error:
        return Finding(
            f"a rank does not start: {error}", "bad", "Report this as an issue, if it says no remedy"
        )
    finally:
        group.close()
    return Finding("a rank started, but took nonsense for a model", "bad", "Report this as a bug")


def _requirement_lines() -> list[str]:
    if not REQUIREMENTS.is_file():
        return []
    lines = [line.split("#")[0].strip() for line in REQUIREMENTS.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line and not line.startswith("-")]


def _numbers(text: str) -> tuple[int, ...]:
    """2.13.0+cpu -> (2, 13, 0)."""
    release = re.match(r"[0-9.]*", text).group()
    return tuple(int(part) for part in release.split(".") if part)
