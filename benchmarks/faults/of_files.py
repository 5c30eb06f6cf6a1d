"""Faults of model files: what happens to one while ranks have loaded it, or before."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.faults.plan import forget_moment, mark_moment
from benchmarks.faults.scene import DEATH, EXCEPTION, Fault, Scene, Seen
from comfy_xdit.protocol.messages import Forget, Load
from comfy_xdit.protocol.spec import ModelSpec

Change = Callable[[Path, Path], None]  # of a file, which may become another one


def _delete(file: Path, _other: Path) -> None:
    file.unlink()


def _truncate(file: Path, _other: Path) -> None:
    os.truncate(file, 5000)


def _replace(file: Path, other: Path) -> None:
    """As an editor does: by another file under its name."""
    shutil.copy(other, file.with_suffix(".new"))
    file.with_suffix(".new").replace(file)


def _write_over(file: Path, other: Path) -> None:
    """As `cp` does: into the same file."""
    shutil.copyfile(other, file)


def _write_over_in_place(file: Path, other: Path) -> None:
    """As `_write_over`, but the file is never shorter."""
    with file.open("r+b") as opened:
        opened.write(other.read_bytes())


def _changed(change: Change, reload: bool) -> Callable[[Scene], Seen]:
    """A loop after a file was changed that is loaded; with `reload`, after the ranks let go of it."""

    def inject(scene: Scene) -> Seen:
        folder = scene.jobs.folder
        file = folder / "changing.safetensors"
        shutil.copyfile(scene.jobs.model.path, file)
        spec = ModelSpec.of(file, "transformer")
        scene.group.call(Load(spec))
        if reload:
            scene.group.call(Forget((spec,)))
        change(file, folder / "other.safetensors")
        forget_moment()
        mark_moment()

        def draw() -> None:
            latent = scene.group.call(scene.jobs.sample(spec=spec)).value
            if not torch.equal(latent, scene.expected[0]):
                raise AssertionError("the picture is another one")

        try:
            return scene.see(draw)
        finally:
            file.unlink(missing_ok=True)

    return inject


def _damaged(scene: Scene) -> Seen:
    file = scene.jobs.folder / "damaged.safetensors"
    file.write_bytes(Path(scene.jobs.model.path).read_bytes()[:-1000])
    forget_moment()
    try:
        return scene.see(lambda: scene.group.call(Load(ModelSpec.of(file, "transformer"))))
    finally:
        file.unlink()


AGAIN = "changed after the node"
FAULTS = [
    Fault("file", "damaged before it is loaded", EXCEPTION, "damaged", _damaged, keeps=True),
    Fault("file", "deleted while loaded", EXCEPTION, None, _changed(_delete, False), keeps=True),
    Fault("file", "replaced while loaded", EXCEPTION, None, _changed(_replace, False), keeps=True),
    Fault("file", "cut off while loaded", DEATH, None, _changed(_truncate, False), keeps=True),
    Fault("file", "copied over while loaded", EXCEPTION, None, _changed(_write_over, False), keeps=True),
    Fault(
        "file",
        "written over in place while loaded",
        EXCEPTION,
        None,
        _changed(_write_over_in_place, False),
        keeps=True,
    ),
    Fault(
        "file", "deleted before it is loaded again", EXCEPTION, "exists", _changed(_delete, True), keeps=True
    ),
    Fault(
        "file", "replaced before it is loaded again", EXCEPTION, AGAIN, _changed(_replace, True), keeps=True
    ),
    Fault(
        "file", "cut off before it is loaded again", EXCEPTION, AGAIN, _changed(_truncate, True), keeps=True
    ),
]
