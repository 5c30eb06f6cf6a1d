"""Files on disk: both namings of both families against diffusers' own converters, and damaged ones."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from comfy_xdit.protocol.errors import InvalidInput
from worker.checkpoints import Checkpoint
from worker.models import detect
from worker.models.flux.family import Flux
from worker.models.sd3.family import SD3


def converted(family, file) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint.at(file)
    config = family.config(checkpoint.shapes)
    return checkpoint.tensors(family.mapping(checkpoint.shapes, config), torch.float32)


@pytest.mark.parametrize("name", ["sd3", "sd3.5-medium"])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_sd3_single_file_equals_diffusers_conversion(tiny_models, tmp_path, name, prefix):
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    file = tmp_path / "sd3.safetensors"
    save_file({prefix + k: v for k, v in load_file(tiny_models[name].file).items()}, file)
    expected = convert_sd3_transformer_checkpoint_to_diffusers(load_file(file))
    actual = converted(SD3(), file)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[k], expected[k]) for k in expected)


def test_flux_single_file_equals_diffusers_conversion(tmp_path):
    """diffusers' converter only knows a width of 3072: one column keeps the file small."""
    from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers

    generator = torch.Generator().manual_seed(0)
    native = {key: torch.randn(shape, generator=generator) for key, shape in flux_shapes(3072, 128).items()}
    file = tmp_path / "flux.safetensors"
    save_file(native, file)
    expected = convert_flux_transformer_checkpoint_to_diffusers(dict(native))
    checkpoint = Checkpoint.at(file)
    config = {"num_layers": 1, "num_single_layers": 1, "guidance_embeds": True,
              "num_attention_heads": 24, "attention_head_dim": 128}  # fmt: skip
    actual = checkpoint.tensors(Flux().mapping(checkpoint.shapes, config), torch.float32)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[k], expected[k]) for k in expected)


def flux_shapes(hidden: int, head: int) -> dict[str, tuple[int, ...]]:
    """Names of BFL's release with one input column each."""
    linear = {
        "img_in": hidden, "txt_in": hidden,
        "final_layer.linear": 64, "final_layer.adaLN_modulation.1": 2 * hidden,
        "single_blocks.0.linear1": 7 * hidden, "single_blocks.0.linear2": hidden,
        "single_blocks.0.modulation.lin": 3 * hidden,
    }  # fmt: skip
    for part in ("time_in", "vector_in", "guidance_in"):
        linear |= {f"{part}.in_layer": hidden, f"{part}.out_layer": hidden}
    for stream in ("img", "txt"):
        at = f"double_blocks.0.{stream}"
        linear |= {f"{at}_attn.qkv": 3 * hidden, f"{at}_attn.proj": hidden, f"{at}_mod.lin": 6 * hidden}
        linear |= {f"{at}_mlp.0": 4 * hidden, f"{at}_mlp.2": hidden}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, out in linear.items():
        shapes |= {f"{name}.weight": (out, 1), f"{name}.bias": (out,)}
    for at in ("double_blocks.0.img_attn.norm", "double_blocks.0.txt_attn.norm", "single_blocks.0.norm"):
        shapes |= {f"{at}.query_norm.scale": (head,), f"{at}.key_norm.scale": (head,)}
    return shapes


@pytest.mark.parametrize("name", ["sd3", "sd3.5-medium", "flux"])
def test_config_from_shapes_equals_the_folders(tiny_models, name):
    """Nothing but tensor shapes, in either naming, gives what config.json says."""
    model = tiny_models[name]
    words = json.loads((model.folder / "config.json").read_text())
    for source in (model.folder, model.file):
        config = model.family.config(Checkpoint.at(source).shapes)
        told = {k: v for k, v in config.items() if k != "sample_size"}
        assert told == {k: tuple(words[k]) if isinstance(words[k], list) else words[k] for k in told}


def test_families_are_told_by_their_tensors(tiny_models):
    for model in tiny_models.values():
        for source in (model.folder, model.file):
            assert detect(source, Checkpoint.at(source).shapes, "x").name == model.family.name
    with pytest.raises(InvalidInput, match="none of the families sd3, flux"):
        detect(Path("sdxl.safetensors"), {"input_blocks.0.0.weight": (1,)}, "sdxl.safetensors")


def test_a_truncated_file_is_named(tiny_models, tmp_path):
    file = tmp_path / "cut.safetensors"
    file.write_bytes(tiny_models["sd3"].file.read_bytes()[:5000])
    with pytest.raises(InvalidInput, match=r"cut.safetensors \(5000 bytes\) is damaged.*download it again"):
        Checkpoint.at(file)


def test_a_pickle_is_refused_with_the_way_to_convert_it(tmp_path):
    file = tmp_path / "model.ckpt"
    file.write_bytes(b"\x80\x04")
    with pytest.raises(InvalidInput, match=r"pickle file.*weights_only=True"):
        Checkpoint.at(file)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(InvalidInput, match=r"no .safetensors file.*pytorch_model.bin.*save_file"):
        Checkpoint.at(tmp_path / "folder")


def test_quantised_weights_are_refused(tiny_models, tmp_path):
    tensors = load_file(tiny_models["sd3"].file) | {"scaled_fp8": torch.zeros(2)}
    save_file(tensors, tmp_path / "quantised.safetensors")
    with pytest.raises(InvalidInput, match="quantised weights"):
        Checkpoint.at(tmp_path / "quantised.safetensors")


PEAK = """
import sys, torch
from pathlib import Path
from worker.checkpoints import Checkpoint, Source

def memory(kind):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return int(line.split()[1]) << 10

checkpoint = Checkpoint.at(Path(sys.argv[1]))
before = memory("VmRSS")
read = checkpoint.tensors({key: Source(key) for key in checkpoint.shapes}, torch.float32, torch.device("cpu"))
print(memory("VmHWM") - before)
"""


def test_what_is_copied_out_of_a_file_is_not_there_twice(tmp_path):
    file = tmp_path / "large.safetensors"
    save_file({str(i): torch.zeros(4 << 20) for i in range(12)}, file)
    ran = subprocess.run([sys.executable, "-c", PEAK, str(file)], capture_output=True, text=True, check=True)
    assert int(ran.stdout) < 1.5 * file.stat().st_size, "twice where the whole file stays open"


def test_of_a_whole_checkpoint_only_the_transformer_counts(tmp_path):
    """Its dtype is not that of the text encoders beside it, and neither are their formats."""
    file = tmp_path / "whole.safetensors"
    inner = {f"model.diffusion_model.{name}": torch.ones(2, 2, dtype=torch.bfloat16) for name in "ab"}
    encoders = {f"text_encoders.{n}.weight": torch.ones(2, 2, dtype=torch.float16) for n in range(9)}
    quantised = {"text_encoders.scaled_fp8": torch.ones(2), "text_encoders.0.scale_weight": torch.ones(1)}
    save_file(inner | encoders | quantised, file)

    checkpoint = Checkpoint.at(file, transformer=True)

    assert set(checkpoint.shapes) == {"a", "b"}
    assert checkpoint.common_dtype() == torch.bfloat16
    with pytest.raises(InvalidInput, match=r"holds quantised weights \(text_encoders"):
        Checkpoint.at(file)
    save_file(inner | {"diffusion_model.a": torch.ones(2, 2)}, file)
    with pytest.raises(InvalidInput, match="has the tensor a twice"):
        Checkpoint.at(file, transformer=True)
