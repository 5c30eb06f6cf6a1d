"""A wheel would hold a part of the pack: none is built, with words, and an editable installation is."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from comfy_xdit.ranks.environment import ROOT

BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])('.')"


@pytest.fixture
def copy(tmp_path):
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "comfy_xdit/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def build(kind: str, folder) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BUILD, kind], cwd=folder, capture_output=True, text=True, timeout=120
    )


def test_a_wheel_is_refused_with_what_to_do(copy):
    done = build("build_wheel", copy)
    assert done.returncode == 1
    assert "ComfyUI/custom_nodes" in done.stderr.splitlines()[-1]
    assert "pip install -r comfy_xdit/requirements.txt" in done.stderr.splitlines()[-1]
    assert not list(copy.glob("*.whl"))


def test_an_editable_installation_gives_the_command(copy):
    done = build("build_editable", copy)
    assert done.returncode == 0, done.stderr
    assert list(copy.glob("comfy_xdit-*.whl"))
