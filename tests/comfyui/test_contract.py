"""Has this ComfyUI changed anything that comfy_types relies on? Each failure is a sentence."""

import logging
import os
import shutil
from pathlib import Path

import pytest

from comfy_xdit import doctor
from tests.comfyui.inputs import layout, python_path


@pytest.fixture
def contract(comfyui):
    """The module; it can be imported only where ComfyUI is."""
    from comfy_xdit.comfy_types import contract

    contract.findings.cache_clear()
    yield contract
    contract.findings.cache_clear()


def test_comfyui_is_as_known(contract):
    assert contract.findings() == ()


def test_twin_has_every_name_and_shape_and_no_weight(contract, run_node, tiny_sd3):
    (stock,) = run_node("UNETLoader", unet_name=tiny_sd3, weight_dtype="default")
    (model,) = run_node(
        "XDiTLoadDiffusionModel", unet_name=tiny_sd3, weight_dtype="default", parallel=layout(1)
    )

    assert not contract.twin(model, stock)
    assert model.model_size() < 1024
    assert model.model.memory_required([2, 16, 128, 128]) == 0


def test_what_has_changed_is_logged_once_and_stands_in_the_report(contract, run_node, monkeypatch, caplog):
    from comfy_xdit.comfy_types import beginning

    def gone() -> list[str]:
        raise AttributeError("no _apply_model")

    monkeypatch.setattr(contract, "CHECKS", (lambda: ["KSampler.steps is gone."], gone))
    beginning._say_what_has_changed.cache_clear()
    with caplog.at_level(logging.WARNING):
        beginning.begin()
        beginning.begin()
    beginning._say_what_has_changed.cache_clear()

    told = [record.getMessage() for record in caplog.records]
    assert [t for t in told if "KSampler.steps is gone." in t] == told[:1]
    assert "gone could not be checked (AttributeError: no _apply_model)." in told[1]
    assert "KSampler.steps is gone." in run_node("XDiTStatus")["result"][0]


def test_the_doctor_knows_this_comfyui(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", python_path())
    (finding,) = doctor.comfyui_findings(Path(os.environ["COMFYUI_DIR"]))
    assert finding.fine and "is as this pack knows it" in finding.text


def test_the_doctor_says_what_a_changed_comfyui_does_otherwise(monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", python_path())
    changed = tmp_path / "ComfyUI"
    shutil.copytree(os.environ["COMFYUI_DIR"], changed, ignore=shutil.ignore_patterns(".git"))
    patcher = changed / "comfy" / "model_patcher.py"
    known = "def partially_load(self, device_to, extra_memory=0, "
    assert known in patcher.read_text()
    patcher.write_text(patcher.read_text().replace(known, known + "urgency=0, "))

    findings = list(doctor.comfyui_findings(changed))

    assert [finding.fine for finding in findings] == [False]
    assert "ModelPatcher.partially_load" in findings[0].text and "urgency" in findings[0].text
