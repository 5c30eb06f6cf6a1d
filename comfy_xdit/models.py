"""`comfy-xdit models FILE`: what a file is, which methods it can use, and what an unknown one is near."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from comfy_xdit.protocol.description import ModelDescription
from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.messages import Check, Compare
from comfy_xdit.protocol.model_files import numbers_by_dtype, quantisation, stored_tensors, transformer_files
from comfy_xdit.protocol.parallel import ParallelConfig
from comfy_xdit.protocol.proofs import UNPROVEN
from comfy_xdit.protocol.spec import HostComfyUI, ModelSpec
from comfy_xdit.ranks.group import WorkerGroup

METHODS = {
    "CFG parallel": {"cfg_parallel_degree": 2},
    "data parallel": {"data_parallel_degree": 2},
    "Ulysses": {"ulysses_degree": 2},
    "Ring": {"ring_degree": 2},
    "PipeFusion": {"pipefusion_degree": 2},
    "sharded weights": {"data_parallel_degree": 2, "shard_weights": True},
}
ROWS, TOKENS = ("CFG parallel", "data parallel"), ("Ulysses", "Ring")
SHOWN = 6  # names of a difference


def lines(path: Path, folder: Path | None) -> Iterator[str]:
    """The report.

    Args:
        path: a safetensors or GGUF file, or a diffusers folder.
        folder: of the ComfyUI whose classes count; None is diffusers' classes alone.

    Raises:
        InvalidInput: nothing is there, a file is damaged, or no ComfyUI is in `folder`.
    """
    comfyui = HostComfyUI.at(folder) if folder else None
    yield from _of_headers(path)
    specs = {"diffusers' class": ModelSpec.of(path, "transformer")}
    if comfyui and path.is_file():
        specs[f"class of ComfyUI {comfyui.version}"] = ModelSpec.of(path, "transformer", comfyui=comfyui)
    group = WorkerGroup(ParallelConfig(devices=("cpu",)))
    try:
        known, refusals = False, []
        for whose, spec in specs.items():
            try:
                answer = group.call(Check(spec, ParallelConfig())).value
            except InvalidInput as error:
                refusals.append(f"{whose}: no: {error}")
                continue
            known = True
            yield from _of_class(whose, ModelDescription.of(answer), spec, group)
        yield from refusals
        if comfyui is None and path.is_file():
            yield "In a ComfyUI there are further classes: name one with --comfyui FOLDER."
        if not known:
            yield from _near(group.call(Compare(str(path.absolute()), comfyui)).value)
    finally:
        group.close()


def _of_headers(path: Path) -> Iterator[str]:
    tensors, files = stored_tensors(path), transformer_files(path)
    size = sum(file.stat().st_size for file in files)
    counts = numbers_by_dtype(tensors)
    numbers = sum(counts.values())
    yield f"{path}: {size / 1e9:.3g} GB in {len(files)} file{'s' * (len(files) > 1)}, {len(tensors)} tensors"
    shares = ", ".join(f"{dtype} {count / max(numbers, 1):.1%}" for dtype, count in counts.items())
    yield f"numbers: {numbers / 1e9:.3g} billion ({shares})"
    yield f"quantisation: {quantisation(path, tensors)}"


def _of_class(whose: str, described: ModelDescription, spec: ModelSpec, group: WorkerGroup) -> Iterator[str]:
    cast = f", computed in {described.manual_cast}" if described.manual_cast else ""
    yield (
        f"{whose}: {described.family}, {described.parameters / 1e9:.3g} billion parameters, "
        f"{described.blocks} blocks; in the ranks of this machine {described.dtype}{cast}"
    )
    for method, degrees in METHODS.items():
        yield f"  {method:<18}{_answer(method, degrees, described, spec, group)}"


def _answer(
    method: str, degrees: dict[str, int], described: ModelDescription, spec: ModelSpec, group: WorkerGroup
) -> str:
    if method in ROWS and not described.rows_apart:
        return "no: its rows depend on each other"
    layout = ParallelConfig(**degrees)
    layout = replace(layout, devices=("cpu",) * layout.world_size)
    try:
        group.call(Check(spec, layout))
    except InvalidInput as error:
        return f"no: {error}"
    if method == "CFG parallel" and not described.guided:
        return "no use: its guidance is distilled, so that there is one prompt"
    if method in TOKENS and described.not_spread == UNPROVEN:
        return f"yes, as far as is known: {UNPROVEN}"
    return "yes"


def _near(found: list[dict]) -> Iterator[str]:
    """The known families whose tensors have most of the same names."""
    if not found:
        yield "It is near no model that is known."
        return
    for one in found:
        yield f"near {one['name']}: {one['share']:.0%} of the names of both"
        for words, names in (
            ("in the file alone", one["more"]),
            ("in the family alone", one["lacking"]),
            ("of other dimensions", one["other"]),
        ):
            if names:
                rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
                yield f"  {words}: {', '.join(names[:SHOWN])}{rest}"
