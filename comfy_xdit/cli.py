"""`python -m comfy_xdit`, in short `comfy-xdit`: run a workflow without ComfyUI, plan, say what is missing.

Exit codes: 0 done, 1 a rank failed (or doctor found something missing), 2 the workflow, a value or
a file is at fault, 130 interrupted. Arguments and files are checked before anything heavy is imported.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from comfy_xdit import __version__
from comfy_xdit.protocol.errors import Interrupted, InvalidInput, XDiTError

DONE, FAILED, INVALID, INTERRUPTED = 0, 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code.

    Args:
        arguments: words after the command's name; those of this process by default.
    """
    chosen = _parser().parse_args(arguments)
    try:
        return chosen.command(chosen)
    except KeyboardInterrupt:  # the second Ctrl-C: the ranks end with this process
        print("comfy-xdit: interrupted", file=sys.stderr)
        return INTERRUPTED
    except XDiTError as error:
        print(f"comfy-xdit: {error}", file=sys.stderr)
        return _exit_code(error)


def _exit_code(error: XDiTError) -> int:
    reason = error.__cause__ if isinstance(error.__cause__, XDiTError) else error
    if isinstance(reason, InvalidInput):
        return INVALID
    return INTERRUPTED if isinstance(reason, Interrupted) else FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="comfy-xdit", description="ComfyUI workflows on all your GPUs, without a ComfyUI server."
    )
    parser.add_argument("--version", action="version", version=f"comfy_xdit {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    _add_run(commands.add_parser("run", help="run a workflow file and write its pictures"))

    demo = commands.add_parser("demo", help="draw a picture on two ranks and on one, and compare them")
    demo.add_argument("prompt", nargs="?", help="e.g. 'a small red circle on the left on a blue background'")
    demo.add_argument("--output", type=Path, default=Path("output"), help="folder for pictures (./output)")
    demo.add_argument("--seed", type=int, default=1)
    demo.set_defaults(command=_demo)

    _add_plan(commands.add_parser("plan", help="say which layout of ranks is fastest, and why"))

    models = commands.add_parser("models", help="say what a model file is, and which methods it can use")
    models.add_argument("file", type=Path, help="a .safetensors or .gguf file, or a diffusers folder")
    models.add_argument(
        "--comfyui", type=Path, metavar="FOLDER", help="whose classes count; by default the one this is in"
    )
    models.set_defaults(command=_models)

    _add_doctor(commands.add_parser("doctor", help="say what this machine has and what is missing"))

    status = commands.add_parser("status", help="say what runs in the ranks of a ComfyUI that runs")
    status.add_argument("--url", default="http://127.0.0.1:8188", help="where it listens (%(default)s)")
    status.add_argument("--json", action="store_true", help="all of it as JSON")
    status.set_defaults(command=_status)

    bench = commands.add_parser("bench", help="time this machine for a minute, for plans that fit it")
    bench.add_argument("--output", type=Path, default=Path("output"), help="folder for the plot (./output)")
    bench.add_argument("--seconds", type=float, default=60.0, help="to begin no layout after (60)")
    bench.set_defaults(command=_bench)
    return parser


def _add_run(run: argparse.ArgumentParser) -> None:
    run.add_argument("workflow", type=Path, help="JSON as ComfyUI saves or exports it (UI or API format)")
    run.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="ID.INPUT=VALUE",
        help="put a value into a node first, e.g. --set 3.seed=7 --set 6.text='a red circle'; repeatable",
    )
    run.add_argument("--output", type=Path, default=Path("output"), help="folder for pictures (./output)")
    run.add_argument(
        "--input", type=Path, action="append", default=[], help="folder where LoadImage looks; repeatable"
    )
    run.add_argument("--quiet", action="store_true", help="print nothing but errors and written files")
    run.add_argument(
        "--timings", action="store_true", help="say where the time went: compute, communication, bridge"
    )
    run.set_defaults(command=_run)


def _add_doctor(doctor: argparse.ArgumentParser) -> None:
    doctor.add_argument(
        "--comfyui", type=Path, metavar="FOLDER", help="the ComfyUI to check; by default the one this is in"
    )
    doctor.add_argument(
        "--families", action="store_true", help="which of its classes are proven to run on several ranks"
    )
    doctor.add_argument(
        "--prove", nargs="*", metavar="CLASS", help="with --families: prove these now, or all (minutes)"
    )
    doctor.add_argument("--json", action="store_true", help="the findings as JSON: level, text, remedy")
    doctor.set_defaults(command=_doctor)


def _add_plan(plan: argparse.ArgumentParser) -> None:
    plan.add_argument("--model", type=Path, help="a diffusion model file, or a diffusers folder")
    plan.add_argument(
        "--family", default="flux", help="a published shape instead: flux, sd3, sd3.5-large ..."
    )
    plan.add_argument("--devices", help="e.g. '8 x L40 PCIe' or '2 x 8 H100 Ethernet'; default: this machine")
    plan.add_argument("--width", type=int, default=1024, help="pixels (1024)")
    plan.add_argument("--height", type=int, default=1024, help="pixels (1024)")
    plan.add_argument("--steps", type=int, default=20)
    plan.add_argument("--batch", type=int, default=1, help="pictures drawn at a time (1)")
    plan.add_argument(
        "--cfg",
        action=argparse.BooleanOptionalAction,
        help="whether a negative prompt guides (default: as the family does)",
    )
    plan.add_argument(
        "--pipefusion", action="store_true", help="list PipeFusion too (XDiTSampler, not exact)"
    )
    plan.add_argument("--all", action="store_true", help="every candidate, not the first dozen")
    plan.set_defaults(command=_plan)


def _run(chosen: argparse.Namespace) -> int:
    from comfy_xdit.headless.workflow import run_file

    if chosen.timings:
        os.environ["XDIT_TIMINGS"] = "1"  # for the ranks: on a GPU communication is measured on demand
    with _cooperative_interrupt():
        finished = run_file(
            chosen.workflow, tuple(chosen.set), chosen.output, tuple(chosen.input), chosen.quiet
        )
    for line in finished.timings() if chosen.timings else ():
        print(line, file=sys.stderr)
    if not chosen.quiet:
        print(f"done in {sum(finished.seconds.values()):.1f} s", file=sys.stderr)
    for path in finished.files:
        print(path)
    return DONE


def _demo(chosen: argparse.Namespace) -> int:
    from comfy_xdit.headless.workflow import check_writable

    check_writable(chosen.output)  # before what is imported now, which takes seconds
    from comfy_xdit import demo

    with _cooperative_interrupt():
        demo.run(chosen.prompt or demo.PROMPT, chosen.output, chosen.seed)
    return DONE


def _plan(chosen: argparse.Namespace) -> int:
    from comfy_xdit.planning import command as plan_command

    size = {name: getattr(chosen, name) for name in ("width", "height", "steps", "batch", "cfg")}
    for line in plan_command.lines(
        chosen.model, chosen.family, chosen.devices, chosen.pipefusion, chosen.all, **size
    ):
        print(line)
    return DONE


def _models(chosen: argparse.Namespace) -> int:
    from comfy_xdit import models
    from comfy_xdit.doctor import own_comfyui

    for line in models.lines(chosen.file, chosen.comfyui or own_comfyui()):
        print(line, flush=True)
    return DONE


def _doctor(chosen: argparse.Namespace) -> int:
    from comfy_xdit.doctor import examine
    from comfy_xdit.protocol.spec import HostComfyUI

    if chosen.families or chosen.prove is not None:
        return _families(chosen)
    if chosen.comfyui is not None:
        HostComfyUI.at(chosen.comfyui)  # a wrong folder is said before a rank starts
    findings = []
    for finding in examine(chosen.comfyui):
        findings.append(finding)
        if not chosen.json:
            print(finding, flush=True)
    if chosen.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
    return DONE if all(finding.fine for finding in findings) else FAILED


def _families(chosen: argparse.Namespace) -> int:
    from comfy_xdit.doctor import own_comfyui
    from comfy_xdit.protocol.spec import HostComfyUI

    folder = chosen.comfyui or own_comfyui()
    if folder is None:
        raise InvalidInput("no ComfyUI is known to this pack; name one with --comfyui FOLDER.")
    host = HostComfyUI.at(folder)
    from comfy_xdit import families  # imports torch: seconds that a wrong folder need not cost

    for line in families.lines(host, chosen.prove):
        print(line, flush=True)
    return DONE


def _status(chosen: argparse.Namespace) -> int:
    from comfy_xdit import status

    told = status.asked(chosen.url)
    print(json.dumps(told, indent=1) if chosen.json else status.words(told))
    return DONE


def _bench(chosen: argparse.Namespace) -> int:
    from comfy_xdit.headless.workflow import check_writable

    if not chosen.seconds > 0:
        raise InvalidInput(f"--seconds is {chosen.seconds:g}; set it to more than 0, e.g. 60.")
    check_writable(chosen.output)
    from comfy_xdit import bench

    bench.run(chosen.output, chosen.seconds)
    return DONE


@contextlib.contextmanager
def _cooperative_interrupt() -> Iterator[None]:
    """Ctrl-C asks the ranks to stop at their next step; a second one ends this process."""
    from comfy_xdit.headless.workflow import request_interrupt

    def ask(_number: int, _frame: object) -> None:
        request_interrupt()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
