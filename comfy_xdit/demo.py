"""`python -m comfy_xdit demo`: the shipped workflow on two ranks and on one, timed and compared."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from comfy_xdit import ROOT
from comfy_xdit.headless.workflow import check_writable, run_file
from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.parallel import ParallelConfig, available_devices
from comfy_xdit.ranks.registry import WorkerGroup, worker_group

WORKFLOW = ROOT / "workflows" / "api" / "demo.json"
PROMPT = "a large yellow circle on the left on a purple background"
LAYOUT, TEXT, SAMPLER = "1", "6", "3"  # nodes of the workflow
KIB = 1 << 10
ENLARGED = 3  # the demo model draws 128 pixels


@dataclass(frozen=True)
class Drawn:
    """One run: the file, its pixels, the sampled latent and the group it ran on."""

    file: Path
    pixels: np.ndarray
    latent: torch.Tensor
    group: WorkerGroup


def run(prompt: str = PROMPT, output: Path = Path("output"), seed: int = 1) -> None:
    """Draw `prompt` on two ranks and on one, print timings and the difference, write the pictures.

    Writes demo.png and demo_compare.png (two ranks, one rank) into `output`.
    """
    if not WORKFLOW.is_file():
        raise InvalidInput(
            f"{WORKFLOW} is not there: the demo runs from a checkout; clone comfy_xdit, and run this there."
        )
    check_writable(output)  # before the ranks start, not after
    devices = _two_devices()
    print(f"prompt: {prompt}")
    with tempfile.TemporaryDirectory() as folder:
        two = _draw(prompt, seed, devices, Path(folder) / "two")
        _report(two)
        one = _draw(prompt, seed, devices[:1], Path(folder) / "one")
        _report(one)
    difference = (two.latent - one.latent).norm() / one.latent.norm()
    levels = np.abs(two.pixels.astype(int) - one.pixels.astype(int)).max()
    print(
        f"two ranks against one: latent differs by {difference:.1e} (relative L2), pixels by at most {levels}"
    )
    _enlarged(two.pixels).save(output / "demo.png")
    _enlarged(np.concatenate([two.pixels, one.pixels], axis=1)).save(output / "demo_compare.png")
    print(f"wrote {output / 'demo.png'} and {output / 'demo_compare.png'} (left: two ranks, right: one)")


def _two_devices() -> tuple[str, ...]:
    """Two GPUs where there are two, else two CPU ranks: the demo shows two ranks on any machine."""
    available = available_devices()
    return available[:2] if len(available) >= 2 else ("cpu", "cpu")


def _draw(prompt: str, seed: int, devices: tuple[str, ...], folder: Path) -> Drawn:
    layout = ParallelConfig(ulysses_degree=len(devices), devices=devices)
    settings = {
        f"{LAYOUT}.strategy": "manual",
        f"{LAYOUT}.ulysses_degree": str(layout.ulysses_degree),
        f"{LAYOUT}.devices": ",".join(devices),
        f"{TEXT}.text": prompt,
        f"{SAMPLER}.seed": str(seed),
    }
    finished = run_file(WORKFLOW, tuple(f"{k}={v}" for k, v in settings.items()), folder)
    with Image.open(finished.files[0]) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    return Drawn(finished.files[0], pixels, finished.outputs[SAMPLER][0]["samples"], worker_group(layout))


def _report(drawn: Drawn) -> None:
    group, timing = drawn.group, drawn.group.timings["Sample"]
    steps = 20
    print(
        f"{group.parallel.describe()} on {', '.join(group.parallel.devices)}: "
        f"{steps / timing.rank:.1f} steps/s, start-up {group.start_seconds:.1f} s, "
        f"bridge {1000 * timing.bridge / steps:.2f} ms per step, "
        f"{timing.sent / KIB:.0f} KiB sent and {timing.received / KIB:.0f} KiB received in the whole run"
    )


def _enlarged(pixels: np.ndarray) -> Image.Image:
    picture = Image.fromarray(pixels)
    return picture.resize((picture.width * ENLARGED, picture.height * ENLARGED), Image.Resampling.NEAREST)
