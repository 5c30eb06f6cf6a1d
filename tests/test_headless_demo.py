"""The shipped workflow, run for real on two ranks, against plain diffusers and transformers."""

from itertools import pairwise

import pytest
import torch

from comfy_xdit.demo_files import DEMO
from comfy_xdit.headless.workflow import Finished, run_file
from comfy_xdit.ranks.environment import ROOT

PIPELINE = DEMO / "pipeline"
WORKFLOW = ROOT / "workflows" / "api" / "demo.json"
STEPS, CFG, SEED = 20, 3.0, 7
PROMPT = "a large green square on the right on a yellow background"
TOLERANCE = 1e-4  # relative L2 of the latent after all steps
LAYOUTS = {
    "one rank": {"1.devices": "cpu"},
    "ulysses 2": {"1.devices": "cpu, cpu", "1.ulysses_degree": "2"},
    "cfg 2": {"1.devices": "cpu, cpu", "1.cfg_parallel_degree": "2"},
}

pytestmark = pytest.mark.skipif(not PIPELINE.is_dir(), reason="no assets/demo")


def run_demo(folder, workflow=WORKFLOW, **settings: str) -> Finished:
    """The demo with PROMPT and SEED, and further settings."""
    settings = {"1.strategy": "manual", "3.seed": str(SEED), "6.text": PROMPT, **settings}
    return run_file(workflow, tuple(f"{k}={v}" for k, v in settings.items()), folder, quiet=True)


def relative_l2(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def encode(text: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Context (1, T, D) and pooled (1, P) by transformers: CLIP-L beside CLIP-G, padded to D."""
    from diffusers import SD3Transformer2DModel
    from transformers import AutoTokenizer, CLIPTextModelWithProjection

    states, pooled = [], []
    for suffix in ("", "_2"):
        tokenizer = AutoTokenizer.from_pretrained(PIPELINE / f"tokenizer{suffix}")
        encoder = CLIPTextModelWithProjection.from_pretrained(PIPELINE / f"text_encoder{suffix}").float()
        length = encoder.config.max_position_embeddings
        ids = tokenizer(text, padding="max_length", max_length=length, return_tensors="pt").input_ids
        output = encoder(ids, output_hidden_states=True)
        states.append(output.hidden_states[-2])
        pooled.append(output.text_embeds)
    width = SD3Transformer2DModel.load_config(PIPELINE / "transformer")["joint_attention_dim"]
    context = torch.cat(states, dim=-1)
    return torch.nn.functional.pad(context, (0, width - context.shape[-1])), torch.cat(pooled, dim=-1)


@pytest.fixture(scope="module")
def reference() -> tuple[torch.Tensor, torch.Tensor]:
    """The latent (1, 16, 16, 16), unscaled, and picture (1, 128, 128, 3) by plain diffusers."""
    from diffusers import AutoencoderKL, SD3Transformer2DModel

    with torch.inference_mode():
        transformer = SD3Transformer2DModel.from_pretrained(PIPELINE / "transformer").float()
        positive, negative = encode(PROMPT), encode("")
        x = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(SEED))
        times = [1 - step / STEPS for step in range(STEPS)]
        sigmas = [3 * t / (1 + 2 * t) for t in times] + [0.0]
        for sigma, following in pairwise(sigmas):
            with_prompt, without = (
                transformer(
                    hidden_states=x,
                    encoder_hidden_states=context,
                    pooled_projections=pooled,
                    timestep=torch.tensor([sigma * 1000]),
                ).sample
                for context, pooled in (positive, negative)
            )
            x = x + (without + CFG * (with_prompt - without)) * (following - sigma)
        latent = x / 1.5305 + 0.0609
        vae = AutoencoderKL.from_pretrained(PIPELINE / "vae").float()
        picture = vae.decode(latent).sample.div(2).add(0.5).clamp(0, 1).movedim(1, -1)
    return latent, picture


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_demo_equals_plain_diffusers(layout, reference, tmp_path):
    finished = run_demo(tmp_path, **LAYOUTS[layout])
    latent, picture = reference
    assert relative_l2(finished.outputs["3"][0]["samples"], latent) <= TOLERANCE
    assert relative_l2(finished.outputs["8"][0], picture) <= TOLERANCE
    assert [path.name for path in finished.files] == ["xdit_demo_00001_.png"]


def test_ksampler_on_the_single_file_is_the_same_run(reference, tmp_path):
    workflow = ROOT / "workflows" / "api" / "demo_ksampler.json"
    finished = run_demo(tmp_path, workflow, **LAYOUTS["ulysses 2"])
    assert relative_l2(finished.outputs["3"][0]["samples"], reference[0]) <= TOLERANCE


def test_image_to_image_keeps_what_the_mask_keeps(tmp_path):
    """Encode the demo's picture, redraw its right half only: the latent's left half stays."""
    from comfy_xdit.headless.folders import Folders
    from comfy_xdit.headless.format import read_workflow
    from comfy_xdit.headless.workflow import node_classes, run

    classes = node_classes()
    drawn = run_demo(tmp_path, **LAYOUTS["one rank"])
    workflow = read_workflow(WORKFLOW, classes)
    nodes = workflow.api
    nodes["1"]["inputs"] |= {"strategy": "manual", "devices": "cpu"}
    nodes["10"] = {"class_type": "LoadImage", "inputs": {"image": drawn.files[0].name}}
    nodes["11"] = {"class_type": "VAEEncode", "inputs": {"pixels": ["10", 0], "vae": ["4", 2]}}
    nodes["12"] = {"class_type": "SetLatentNoiseMask", "inputs": {"samples": ["11", 0], "mask": ["13", 0]}}
    nodes["13"] = {"class_type": "RightHalf", "inputs": {}}
    nodes["3"]["inputs"] |= {"latent_image": ["12", 0], "denoise": 0.6, "steps": 4}
    finished = run(workflow, Folders(tmp_path, (tmp_path,)), {**classes, "RightHalf": RightHalf})
    before, after = finished.outputs["11"][0]["samples"], finished.outputs["3"][0]["samples"]
    assert torch.allclose(after[..., :8], before[..., :8], atol=1e-5)
    assert relative_l2(after[..., 8:], before[..., 8:]) > 0.01


class RightHalf:
    """A mask (1, 128, 128): 1 in its right half."""

    RETURN_TYPES, FUNCTION = ("MASK",), "make"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    def make(self):
        mask = torch.zeros(1, 128, 128)
        mask[..., 64:] = 1
        return (mask,)
