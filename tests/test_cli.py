"""The command comfy-xdit as a person uses it: exit codes, messages, Ctrl-C, a rank that dies."""

import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from comfy_xdit import cli, doctor
from comfy_xdit.protocol import installed_in, remembered
from comfy_xdit.protocol.errors import RemoteError
from comfy_xdit.ranks.environment import ROOT

DEMO = ROOT / "workflows" / "api" / "demo.json"
SECONDS = 120  # for a start of two ranks on a busy machine
needs_demo = pytest.mark.skipif(not (ROOT / "assets/demo/pipeline").is_dir(), reason="no assets/demo")


def start(*arguments: str, cwd: Path) -> subprocess.Popen[bytes]:
    """The command as its own process, so that signals reach it as from a terminal."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "comfy_xdit", *arguments],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def read_until(process: subprocess.Popen[bytes], text: bytes) -> bytes:
    """What the process wrote to stderr up to and with `text`; fails after SECONDS."""
    seen, deadline = b"", time.monotonic() + SECONDS
    os.set_blocking(process.stderr.fileno(), False)
    with selectors.DefaultSelector() as selector:
        selector.register(process.stderr, selectors.EVENT_READ)
        while text not in seen:
            assert selector.select(deadline - time.monotonic()), f"no {text!r} in {seen[-2000:]!r}"
            piece = os.read(process.stderr.fileno(), 4096)
            assert piece, f"ended without {text!r}: {seen[-2000:]!r}"
            seen += piece
    os.set_blocking(process.stderr.fileno(), True)
    return seen


@pytest.fixture
def long_run(tmp_path):
    """A run of 5,000 steps on one rank that has done some, and its process is gone afterwards."""
    settings = ["1.strategy=manual", "1.devices=cpu", "3.steps=5000"]
    process = start("run", str(DEMO), *[w for s in settings for w in ("--set", s)], cwd=tmp_path)
    try:
        read_until(process, b"/5000 [")
        read_until(process, b" 2/5000")
        yield process
    finally:
        process.kill()
        process.communicate(timeout=SECONDS)


# ---------------------------------------------------------------------- run


@needs_demo
def test_run_writes_the_picture_and_prints_where_it_is_and_the_time_went(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDIT_TIMINGS", "0")  # what --timings sets is over with the test
    settings = ["3.steps=2", "1.strategy=manual", "1.devices=cpu"]
    words = [w for s in settings for w in ("--set", s)]
    assert cli.main(["run", str(DEMO), "--output", str(tmp_path), "--quiet", "--timings", *words]) == cli.DONE
    printed = capsys.readouterr()
    assert "\n  Sample: 2 steps of " in printed.err and " ms: compute " in printed.err
    assert all(line.startswith(("node ", "  ")) for line in printed.err.splitlines())
    assert Path(printed.out.strip()) == tmp_path / "xdit_demo_00001_.png"
    assert (tmp_path / "xdit_demo_00001_.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere.json"], "cannot read nowhere.json"),
        ([str(DEMO), "--set", "99.text=x"], "no node '99'; there are 1 (XDiTParallelConfig)"),
        ([str(DEMO), "--set", "6.txt=x"], "no input 'txt'; it has text, clip"),
        ([str(DEMO), "--set", "3.steps=0"], "node 3 (XDiTSampler): steps is 0, at least 1"),
        ([str(DEMO), "--set", "4.pipeline=nothing"], "pipeline is 'nothing', not one of: "),
        ([str(DEMO), "--set", "1.strategy=manual", "--set", "1.devices=cuda:99"], "'cuda:99' is not one of"),
    ],
)
def test_a_wrong_input_is_said_in_one_message(arguments, words, capsys):
    assert cli.main(["run", *arguments, "--quiet"]) == cli.INVALID
    printed = capsys.readouterr().err
    assert words in printed
    assert "Traceback" not in printed


def test_a_failure_in_a_rank_is_exit_code_1(monkeypatch, capsys):
    def fail(*_):
        raise RemoteError(1, "ValueError", "broken", "Traceback of the rank")

    monkeypatch.setattr("comfy_xdit.headless.workflow.run_file", fail)
    assert cli.main(["run", str(DEMO)]) == cli.FAILED
    assert "rank 1: ValueError: broken" in capsys.readouterr().err


def test_without_a_workflow_argparse_explains(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["run"])
    assert "WORKFLOW" in capsys.readouterr().err.upper()


@needs_demo
def test_ctrl_c_stops_the_ranks_at_a_step(long_run):
    ranks = psutil.Process(long_run.pid).children()
    long_run.send_signal(signal.SIGINT)
    _, errors = long_run.communicate(timeout=SECONDS)
    assert long_run.returncode == cli.INTERRUPTED
    assert b"comfy-xdit: node 3 (XDiTSampler): interrupted" in errors
    assert b"Traceback" not in errors
    assert ranks
    assert psutil.wait_procs(ranks, timeout=SECONDS)[1] == []


@needs_demo
def test_a_killed_rank_is_exit_code_1_and_named(long_run):
    (rank,) = (child for child in psutil.Process(long_run.pid).children() if child.name() == "xdit rank 0")
    rank.kill()
    _, errors = long_run.communicate(timeout=SECONDS)
    assert long_run.returncode == cli.FAILED
    assert b"rank 0 (cpu, pid %d) was ended by SIGKILL" % rank.pid in errors


@needs_demo
def test_demo_compares_two_ranks_with_one(tmp_path, capsys):
    prompt = "a large green square on the right on a yellow background"
    assert cli.main(["demo", prompt, "--output", str(tmp_path / "new")]) == cli.DONE
    printed = capsys.readouterr().out
    assert prompt in printed
    assert "two ranks against one" in printed
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"demo.png", "demo_compare.png"}


# ---------------------------------------------------------------------- doctor


def test_doctor_starts_a_rank(capsys):
    assert cli.main(["doctor"]) == cli.DONE
    printed = capsys.readouterr().out
    assert "a rank started in " in printed
    assert "[!!]" not in printed


def test_doctor_names_what_is_missing_and_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "_requirement_lines", lambda: ["no-such-package-here>=1"])
    assert cli.main(["doctor"]) == cli.FAILED
    printed = capsys.readouterr().out
    assert "no-such-package-here is not installed" in printed
    assert f"     Run: {sys.executable} -m pip install 'no-such-package-here>=1'" in printed


def test_doctor_as_json_names_level_and_remedy(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "_requirement_lines", lambda: ["no-such-package-here>=1"])
    assert cli.main(["doctor", "--json"]) == cli.FAILED
    findings = json.loads(capsys.readouterr().out)
    assert {tuple(finding) for finding in findings} == {("text", "level", "remedy")}
    assert findings[0]["level"] == "ok" and findings[0]["text"].startswith("Python ")
    assert findings[-1]["level"] == "bad" and "pip install" in findings[-1]["remedy"]


def test_doctor_does_not_call_it_well_that_there_is_no_gpu_or_no_comfyui():
    assert str(doctor._no_gpu(None)).startswith("[--] no GPU (torch is built without CUDA)")
    assert "nvidia-smi" in doctor._no_gpu("12.8").remedy
    (nowhere,) = doctor.comfyui_findings(None)
    assert nowhere.level == "note" and "--comfyui FOLDER" in nowhere.remedy


def test_a_pack_in_another_base_directory_knows_the_comfyui_that_loaded_it(tmp_path, monkeypatch):
    monkeypatch.setenv(remembered.FOLDER, str(tmp_path / "cache"))
    pack = tmp_path / "base" / "custom_nodes" / "comfy_xdit"
    monkeypatch.setattr(installed_in, "ROOT", pack)
    comfyui = tmp_path / "ComfyUI"
    (comfyui / "comfy").mkdir(parents=True)
    (comfyui / "comfyui_version.py").write_text('__version__ = "0.8.0"\n')
    assert installed_in.own_comfyui() is None, "the base directory has no comfy folder"

    installed_in.remember_comfyui(str(comfyui))

    assert installed_in.own_comfyui() == comfyui
    shutil.rmtree(comfyui)
    assert installed_in.own_comfyui() is None, "it is gone"


def test_a_pack_in_a_comfyuis_own_custom_nodes_belongs_to_it(tmp_path, monkeypatch):
    monkeypatch.setattr(installed_in, "ROOT", tmp_path / "custom_nodes" / "comfy_xdit")
    (tmp_path / "comfy").mkdir()
    (tmp_path / "comfyui_version.py").write_text('__version__ = "0.8.0"\n')
    assert installed_in.own_comfyui() == tmp_path


def test_doctor_says_what_is_no_comfyui_and_what_cannot_be_looked_at(tmp_path):
    (elsewhere,) = doctor.comfyui_findings(tmp_path)
    assert not elsewhere.fine and "is no ComfyUI" in elsewhere.text
    (tmp_path / "comfy").mkdir()
    (tmp_path / "comfyui_version.py").write_text('__version__ = "0.8.0"\n')
    (empty,) = doctor.comfyui_findings(tmp_path)
    assert not empty.fine and "could not be looked at: ModuleNotFoundError" in empty.text


@pytest.mark.parametrize(
    ("requirement", "fine"),
    [
        ("pytest", True),
        ("pytest>=1,<1000", True),
        ("pytest>=1000", False),
        ("pytest<1", False),
        ("pytest==1.*", False),
    ],
)
def test_doctor_reads_bounds(requirement, fine):
    assert doctor.package_finding(requirement).fine is fine
