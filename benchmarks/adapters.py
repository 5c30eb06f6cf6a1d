"""LoRA, ControlNet and IP-Adapter in the ranks against plain diffusers: a part of docs/parity.md."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.layouts import LAYOUTS
from benchmarks.parity import multiplier
from comfy_xdit.headless.surroundings import HEADLESS
from comfy_xdit.nodes.ip_adapter import apply_ip_adapter, load_ip_adapter
from comfy_xdit.nodes.lora import add_lora
from comfy_xdit.protocol.parallel import ParallelConfig
from comfy_xdit.protocol.spec import ModelSpec
from comfy_xdit.remote.ip_adapter import at_sigmas
from comfy_xdit.remote.model import RemoteModel
from tests import controlnets, ip_adapter_files, lora_files, tiny
from tests.tiny import TinyModel

ON = ("1 rank", "Ulysses 2", "Ring 2", "CFG 2", "Ulysses 2 x Ring 2", "CFG 2 x Ulysses 2")
SIZE = (6, 22)  # latent pixels: 33 tokens, which no number of ranks divides
TEXT, BATCH = 9, 2
TEXT_ABOUT = """## LoRA, ControlNet and IP-Adapter

One transformer call with the adapter, as above: relative L2, fp32, against plain diffusers on one rank, which
loads the same weights ({tokens} image and {text} text tokens, {batch} pictures). Random adapters in the
formats of kohya (LoRA), InstantX (ControlNets, the union's mode 2; IP-Adapter of SD3) and XLabs (IP-Adapter
of FLUX.1). Held by `tests/test_lora_loader.py`, `test_controlnet_ranks.py` and `test_ip_adapter.py`, with
strengths, stacks, whole runs, and the base model's bits afterwards.

{table}
"""
Case = Callable[[TinyModel, RemoteModel], tuple[torch.Tensor, torch.Tensor]]  # ours, diffusers'


def _inputs(model: TinyModel) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    x = controlnets.random(BATCH, 16, *SIZE, seed=1)
    timestep = torch.full((BATCH,), 0.7 * multiplier(model))
    return x, timestep, tiny.conditions(model.family, model.config, TEXT, BATCH)


def lora(folder: Path) -> Case:
    """kohya's names, strength 0.8."""

    def case(model: TinyModel, base: RemoteModel) -> tuple[torch.Tensor, torch.Tensor]:
        tensors, change = lora_files.write(model, lora_files.NAMINGS["kohya"], 1)
        file = folder / f"{model.family.name}.safetensors"
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, file)
        module = lora_files.merged(model, (change, 0.8))
        remote, _ = add_lora(base, str(file), 0.8, HEADLESS)
        return remote.denoise(*_inputs(model)), tiny.reference(model.family, module, *_inputs(model))

    return case


def control_net(net: controlnets.TinyNet, mode: int | None = None) -> Case:
    """Strength 0.8."""

    def case(model: TinyModel, base: RemoteModel) -> tuple[torch.Tensor, torch.Tensor]:
        asked = _inputs(model)
        hint = controlnets.hint_for(net, asked[0])
        ours = base.denoise(*asked, nets=(controlnets.applied(net, hint, 0.8, mode=mode),))
        return ours, controlnets.reference(model, *asked, (net, hint, 0.8, mode))

    return case


def ip_adapter(folder: Path) -> Case:
    """Weight 0.8."""

    def case(model: TinyModel, base: RemoteModel) -> tuple[torch.Tensor, torch.Tensor]:
        asked, output = _inputs(model), ip_adapter_files.encoded(model)
        file = ip_adapter_files.write(model, 1, folder / f"{model.family.name}_ip.safetensors")
        adapter = load_ip_adapter(str(file), HEADLESS)
        remote = apply_ip_adapter(base, adapter, output, 0.8, 0.0, 1.0, here=HEADLESS)
        ours = base.denoise(*asked, image_prompts=at_sigmas(remote.pictures, lambda percent: 1.0 - percent))
        module = ip_adapter_files.reference(model, [file], [0.8])
        return ours, ip_adapter_files.call(model, module, *asked, [ip_adapter_files.embeds_of(model, output)])

    return case


def errors(
    cases: dict[tuple[str, str], Case], models: dict[str, TinyModel], layout: ParallelConfig
) -> Iterator[float]:
    """Relative L2 of each case under one layout."""
    for (_, name), case in cases.items():
        base = RemoteModel(ModelSpec.of(models[name].file, "transformer"), layout)
        yield tiny.relative_l2(*case(models[name], base))


def section(folder: Path, models: dict[str, TinyModel]) -> str:
    """Markdown."""
    folder.mkdir()
    nets = controlnets.write_nets(folder / "nets")
    cases: dict[tuple[str, str], Case] = {}
    for name in ("sd3", "flux"):
        cases["LoRA", name] = lora(folder)
        cases["ControlNet", name] = control_net(nets[name])
        cases["IP-Adapter", name] = ip_adapter(folder)
    cases["ControlNet, union", "flux"] = control_net(nets["flux union"], mode=2)
    columns = [list(errors(cases, models, LAYOUTS[name])) for name in ON]
    lines = [("adapter", "family", *ON), ("---",) * (len(ON) + 2)]
    for case, *found in sorted(zip(cases, *columns, strict=True)):
        lines.append((*case, *(f"{error:.1e}" for error in found)))
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return TEXT_ABOUT.format(table=table, tokens=SIZE[0] * SIZE[1] // 4, text=TEXT, batch=BATCH)
