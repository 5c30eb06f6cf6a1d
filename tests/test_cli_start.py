"""What a command says before anything heavy is imported: seconds that a wrong argument need not cost."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from comfy_xdit import cli
from comfy_xdit.ranks.environment import ROOT

HEAVY = ("torch", "numpy", "PIL", "diffusers", "transformers", "xfuser", "safetensors")
DEMO = str(ROOT / "workflows" / "api" / "demo.json")
# Runs commands in one process; says of each its exit code, what it printed, and what of HEAVY it imported.
PROGRAM = """
import contextlib, io, json, sys
from comfy_xdit.cli import main
for name in json.loads(sys.argv[3]):
    sys.modules[name] = None  # an import of it fails
for arguments in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            code = main(arguments)
        except SystemExit as ended:
            code = ended.code
    imported = [name for name in json.loads(sys.argv[2]) if sys.modules.get(name)]
    print(json.dumps([code, imported, out.getvalue(), err.getvalue()]))
"""
Told = tuple[int, list[str], str, str]


def told(commands: list[list[str]], blocked: tuple[str, ...] = ()) -> list[Told]:
    """Exit code, heavy imports so far, stdout and stderr of each command."""
    words = [json.dumps(part) for part in (commands, HEAVY, blocked)]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


WRONG = [
    (["run"], "the following arguments are required"),
    (["run", "nowhere.json"], "cannot read nowhere.json: No such file or directory; name a workflow file."),
    (["run", DEMO, "--set", "99.text=x"], "no node '99'; there are 1 (XDiTParallelConfig)"),
    (["run", DEMO, "--set", "6.txt=x"], "no input 'txt'; it has text, clip"),
    (["run", DEMO, "--set", "3.steps=0"], "node 3 (XDiTSampler): steps is 0, at least 1"),
    (["run", DEMO, "--set", "3.scheduler=fast"], "scheduler is 'fast', not one of: simple, "),
    (["run", DEMO, "--output", "/proc/no"], "nothing can be written to /proc/no"),
    (["demo", "--output", "/proc/no"], "name another folder with --output"),
    (["bench", "--output", "/proc/no"], "name another folder with --output"),
    (["bench", "--seconds", "0"], "set it to more than 0"),
    (
        ["plan", "--width", "10"],
        "width is 10 pixels; a side has 16 to 16384, in steps of 8. Set --width",
    ),
    (["plan", "--height", "1021"], "Set --height to 1024."),
    (["plan", "--height", "99999"], "Set --height to 16384."),
    (["plan", "--steps", "0"], "set --steps between 1 and 10000"),
    (["plan", "--family", "sdxl"], "choose one of them, or name a file with --model"),
    (["plan", "--model", "nowhere.safetensors"], "nowhere.safetensors"),
    (["plan", "--devices", "8 x Abacus"], "is no cluster this version can describe"),
    (["doctor", "--comfyui", "/proc"], "/proc is no ComfyUI"),
    (["doctor", "--families", "--comfyui", "/proc"], "/proc is no ComfyUI"),
    (["status", "--url", "ftp://x"], "write it as http://127.0.0.1:8188"),
    (["status", "--url", "http://127.0.0.1:9"], "no ComfyUI answers at http://127.0.0.1:9"),
]


@pytest.fixture(scope="module")
def answers() -> dict[str, Told]:
    commands = [arguments for arguments, _ in WRONG]
    return {" ".join(one): answer for one, answer in zip(commands, told(commands), strict=True)}


@pytest.mark.parametrize(("arguments", "words"), WRONG)
def test_what_is_wrong_is_said_before_torch_is_imported(answers, arguments, words):
    code, imported, printed, errors = answers[" ".join(arguments)]
    assert code == cli.INVALID
    assert words in errors
    assert imported == [] and printed == "" and "Traceback" not in errors


def test_described_gpus_are_planned_for_without_torch():
    ((code, imported, printed, _),) = told(
        [["plan", "--devices", "4 x L40 PCIe"]], blocked=("torch", "numpy")
    )
    assert (code, imported) == (cli.DONE, [])
    assert "on 4 x L40, PCIe" in printed and "<- pick" in printed
