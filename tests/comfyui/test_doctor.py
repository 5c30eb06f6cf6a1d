"""`doctor --families --prove` on the ComfyUI at hand: two ranks, through the command line."""

from __future__ import annotations

import os

import pytest

from comfy_xdit import cli
from comfy_xdit.protocol import remembered

CLASS = "MMDiT"


@pytest.fixture
def proving(comfyui, tmp_path, monkeypatch):
    monkeypatch.setenv(remembered.FOLDER, str(tmp_path / "cache"))
    return ["doctor", "--families", "--comfyui", os.environ["COMFYUI_DIR"]]


def test_one_class_is_proven_shown_and_remembered(proving, capsys):
    assert cli.main([*proving, "--prove", CLASS]) == cli.DONE
    told = capsys.readouterr().out.splitlines()

    assert [line.split()[0] for line in told[1:] if not line.startswith(" ")] == [CLASS, CLASS]
    tokens, patches = (line for line in told if line.startswith(CLASS))
    assert tokens.endswith("Ulysses and Ring: yes") and patches.endswith("PipeFusion: yes")
    assert sum("proven: " in line for line in told) == 2

    assert cli.main(proving) == cli.DONE
    assert capsys.readouterr().out.splitlines()[1:-1] == told[1:], "as it is remembered"


def test_a_class_without_a_plan_is_refused(proving, capsys):
    assert cli.main([*proving, "--prove", "UNetModel"]) == cli.INVALID
    assert "there is no plan for UNetModel; choose among " in capsys.readouterr().err
