"""What is remembered of ComfyUI's classes: which plan is right, and for which code."""

import json
import logging
from dataclasses import replace

import pytest

from comfy_xdit import cli
from comfy_xdit.planning import auto
from comfy_xdit.protocol import proofs, remembered
from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.proofs import Kind, Proof
from comfy_xdit.protocol.spec import HostComfyUI
from tests.described import DESCRIBED

GOOD, BAD, NONE = Kind(2e-7, 0.03), Kind(0.9, 0.9, "off by 9e-01"), Kind(unbuilt="TypeError: no such size")
INFO = replace(DESCRIBED, family="Flux", comfyui=True, heads=6, guided=False, planned=True)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A cache of its own for every test."""
    monkeypatch.setenv(remembered.FOLDER, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def host(tmp_path):
    """A folder that looks like a ComfyUI."""
    model = tmp_path / "ComfyUI" / "comfy" / "ldm" / "flux" / "model.py"
    model.parent.mkdir(parents=True)
    model.write_text("class Flux: ...\n")
    (tmp_path / "ComfyUI" / "comfyui_version.py").write_text('__version__ = "0.8.0"\n')
    proofs.digest.cache_clear()
    return HostComfyUI.at(tmp_path / "ComfyUI")


def proof(*tried: dict[str, Kind], name: str = "Flux", attention: str = "attention_pytorch") -> Proof:
    return Proof(name, attention, proofs.TOKENS, tried)


def test_the_first_plan_that_is_right_counts():
    assert proof({"flux": GOOD}).plan == 0
    assert proof({"flux": BAD}, {"flux": GOOD}).plan == 1
    assert proof({"flux": BAD}, {"flux": GOOD}).why == ""
    assert proof({"flux": BAD}).why == "flux: off by 9e-01"
    assert proof({"flux": BAD}, {"flux": BAD}).why == "plan 1: flux: off by 9e-01; plan 2: flux: off by 9e-01"


def test_a_call_that_is_not_built_does_not_count_and_one_must_be():
    assert proof({"flux": GOOD, "flux2": NONE}).plan == 0
    assert proof({"flux": GOOD, "flux2": BAD}).plan is None
    assert "no tiny model to prove it on (flux: TypeError" in proof({"flux": NONE}).why
    assert proof({}).plan is None


def test_what_is_remembered_is_read_again(host):
    assert proofs.why_not_spread(host, "Flux") == proofs.UNPROVEN
    proofs.remember(host, proof({"flux": BAD}))
    proofs.remember(host, proof({"flux": GOOD}))

    assert proofs.read(host, "Flux", "attention_pytorch", proofs.TOKENS) == proof({"flux": GOOD})
    assert proofs.read(host, "Flux", "attention_sage", proofs.TOKENS) is None
    assert proofs.read(host, "Flux", "attention_pytorch", proofs.PATCHES) is None
    assert proofs.why_not_spread(host, "Flux") == ""
    proofs.remember(host, proof({"flux": BAD}, attention="attention_sage"))
    assert proofs.why_not_spread(host, "Flux") == "flux: off by 9e-01"


def test_another_source_with_the_same_version_is_another_class(host, tmp_path):
    proofs.remember(host, proof({"flux": GOOD}))
    (tmp_path / "ComfyUI" / "comfy" / "ldm" / "flux" / "model.py").write_text("class Flux: changed = True\n")
    proofs.digest.cache_clear()

    assert proofs.read(host, "Flux", "attention_pytorch", proofs.TOKENS) is None


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"Flux 1 a": {}}', '{"Flux": 1}', '{"Wan 1 a": {"name": "Flux"}}']
)
def test_a_damaged_file_counts_as_empty_and_is_said(host, folder, caplog, text):
    folder.mkdir()
    (folder / proofs.NAME).write_text(text)
    with caplog.at_level(logging.WARNING):
        assert list(proofs.known(host)) == []
    assert "counts as empty" in caplog.text
    proofs.remember(host, proof({"flux": GOOD}))
    assert json.loads((folder / proofs.NAME).read_text())


def test_auto_spreads_tokens_only_where_that_is_proven():
    refused = replace(INFO, not_spread="flux: off by 9e-01")
    devices = ("cpu",) * 4

    assert auto._of_class(INFO, devices, False).ulysses_degree == 3  # of six heads
    assert auto._of_class(refused, devices, False).world_size == 1
    assert auto._of_class(replace(refused, guided=True), devices, False).cfg_parallel_degree == 2
    assert auto._of_class(refused, devices, True).data_parallel_degree == 4
    assert auto._why_of_class(refused).endswith(
        "one prompt at a time; tokens are not spread: flux: off by 9e-01"
    )


def test_doctor_prints_the_table_of_a_comfyui(host, capsys):
    proofs.remember(host, proof({"flux": GOOD, "flux2": NONE}))
    proofs.remember(host, proof({"wan t2v": BAD}, name="WanModel"))

    assert cli.main(["doctor", "--families", "--comfyui", host.root]) == cli.DONE

    head, *table, _ = capsys.readouterr().out.splitlines()
    assert "ComfyUI 0.8.0" in head
    assert table == [
        "Flux (attention_pytorch), Ulysses and Ring: yes",
        "  flux                    proven: 2e-07 (3e-02 without the others' keys)",
        "  flux2                   not in this ComfyUI: TypeError: no such size",
        "WanModel (attention_pytorch), Ulysses and Ring: no: wan t2v: off by 9e-01",
        "  wan t2v                 wrong: off by 9e-01",
    ]


def test_doctor_wants_a_comfyui(tmp_path):
    with pytest.raises(InvalidInput, match="is no ComfyUI"):
        HostComfyUI.at(tmp_path)
    assert cli.main(["doctor", "--families", "--comfyui", str(tmp_path)]) == cli.INVALID
