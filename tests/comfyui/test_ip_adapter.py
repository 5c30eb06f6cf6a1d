"""The IP-Adapter nodes in ComfyUI: stock CLIPVisionEncode before them, plain diffusers to compare with."""

import json
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from comfy_xdit.protocol.errors import InvalidInput
from tests import ip_adapter_files, tiny
from tests.comfyui.inputs import conditioning_for, empty_latent, pair, relative_l2
from worker.models.flux.family import Flux
from worker.models.sd3.family import SD3

PER_RUN = 1e-4
STEPS = 5
HEIGHT, WIDTH = 10, 14
SAMPLERS = ("KSampler", "XDiTSampler")
FAMILIES = {
    "sd3": (SD3(), {**tiny.SD3_CONFIG, "num_layers": 4}, {}),
    "flux": (Flux(), tiny.FLUX_CONFIG, {"guidance": 2.5}),
}
# The encoders' kinds at a tiny size; widths of the adapters in tests/ip_adapter_files.py.
ENCODERS = {
    "sd3": {"model_type": "siglip_vision_model", "hidden_size": ip_adapter_files.SIGLIP},
    "flux": {"model_type": "clip_vision_model", "hidden_size": 32, "projection_dim": ip_adapter_files.CLIP},
}


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, comfyui, degrees, tmp_path_factory) -> SimpleNamespace:
    """Our MODEL, an adapter's name, an encoded picture, and plain diffusers with and without the adapter."""
    family, config, options = FAMILIES[request.param]
    file_name = request.getfixturevalue(f"tiny_{request.param}")
    run_node = _run_node(comfyui)
    with torch.inference_mode(False):
        model = tiny.TinyModel(family, config, tiny.build(family, config), None, None)
        folder = comfyui.models / "ipadapter"
        folder.mkdir(exist_ok=True)
        file = ip_adapter_files.write(model, 1, folder / f"{request.param}.safetensors")
    import folder_paths

    if str(folder) not in folder_paths.folder_names_and_paths.get("ipadapter", ([],))[0]:
        comfyui.mappings["XDiTIPAdapterLoader"].INPUT_TYPES()  # registers the folder
        folder_paths.add_model_folder_path("ipadapter", str(folder))
    models = pair(run_node, file_name, degrees)
    (adapter,) = run_node("XDiTIPAdapterLoader", ipadapter_name=file.name)
    output = _encoded(run_node, request.param, tmp_path_factory.mktemp("vision"))
    return SimpleNamespace(
        **vars(models), model=model, config=config, options=options, file=file, adapter=adapter, output=output
    )


def _run_node(comfyui: SimpleNamespace) -> Any:
    def run(name: str, **inputs: Any) -> tuple[Any, ...]:
        node = comfyui.mappings[name]
        with torch.inference_mode():
            return getattr(node(), node.FUNCTION)(**inputs)

    return run


def _encoded(run_node: Any, name: str, folder: Any) -> Any:
    """A picture through ComfyUI's own CLIP Vision classes and CLIPVisionEncode."""
    import comfy.clip_vision

    config = {
        "num_channels": 3, "hidden_act": "gelu", "image_size": 28, "intermediate_size": 64, "patch_size": 14,
        "num_attention_heads": 2, "num_hidden_layers": 3, **ENCODERS[name],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    vision = comfy.clip_vision.ClipVisionModel(str(folder / "config.json"))
    tiny.randomise(vision.model, 3)
    image = torch.rand(1, 40, 50, 3, generator=torch.Generator().manual_seed(2))
    (output,) = run_node("CLIPVisionEncode", clip_vision=vision, image=image, crop="center")
    return output


def applied(case: SimpleNamespace, run_node: Any, weight: float = 0.8, start: float = 0.0, end: float = 1.0):
    (model,) = run_node(
        "XDiTIPAdapterApply", model=case.ours, ip_adapter=case.adapter, clip_vision_output=case.output,
        weight=weight, start_percent=start, end_percent=end,
    )  # fmt: skip
    return model


def sampled(
    case: SimpleNamespace, run_node: Any, model: Any, node: str, cfg: float = 3.0, **changed: Any
) -> torch.Tensor:
    positive, negative = (conditioning_for(case.config, seed, **case.options) for seed in (1, 2))
    latent = changed.pop("latent", empty_latent(1, HEIGHT, WIDTH))
    if changed.pop("shorter", False):
        negative[0][0] = negative[0][0][:, :7]
    (latent,) = run_node(
        node, model=model, seed=7, steps=STEPS, cfg=cfg, sampler_name="euler", scheduler="simple",
        positive=positive, negative=negative, latent_image=latent, denoise=1.0,
    )  # fmt: skip
    return latent["samples"]


def by_diffusers(
    case: SimpleNamespace, cfg: float, start: float = 0.0, end: float = 1.0, sampled_as: Any = None
) -> torch.Tensor:
    """The run by hand: Euler over plain diffusers, with ComfyUI's noise and noise levels."""
    import comfy.sample
    import comfy.samplers

    sampling = (sampled_as or case.stock).get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", STEPS)
    noise = comfy.sample.prepare_noise(empty_latent(1, HEIGHT, WIDTH)["samples"], 7)
    first, last = sampling.percent_to_sigma(start), sampling.percent_to_sigma(end)
    module = ip_adapter_files.reference(case.model, [case.file], [0.8])
    seen = [ip_adapter_files.embeds_of(case.model, case.output).clone()]
    sides = [(1, False), (2, True)] if cfg != 1.0 else [(1, False)]
    x, acted = sigmas[0] * noise, []
    for sigma, following in pairwise(sigmas):
        acted.append(first >= float(sigma) >= last)
        outputs, t = [], sampling.timestep(sigma).reshape(1)
        for seed, negative in sides:
            ((context, words),) = conditioning_for(case.config, seed, **case.options)
            given = {"context": context, "y": words["pooled_output"]}
            given |= {name: torch.tensor([value]) for name, value in case.options.items()}
            if acted[-1]:
                outputs.append(ip_adapter_files.call(case.model, module, x, t, given, seen, [negative]))
            else:
                outputs.append(tiny.reference(case.model.family, case.model.module, x, t, given))
        slope = outputs[0] if cfg == 1.0 else outputs[1] + cfg * (outputs[0] - outputs[1])
        x = x + slope * (following - sigma)
    assert any(acted) and (all(acted) == (start == 0.0))
    return case.stock.model.process_latent_out(x)


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_a_run_equals_diffusers_by_either_sampler(case, run_node, cfg):
    with torch.inference_mode(False):
        expected = by_diffusers(case, cfg)
    model = applied(case, run_node)
    base = {node: sampled(case, run_node, case.ours, node, cfg) for node in SAMPLERS}
    for node in SAMPLERS:
        assert relative_l2(sampled(case, run_node, model, node, cfg), expected) <= PER_RUN, node
        assert relative_l2(base[node], expected) > 10 * PER_RUN, "it would be missed"
        assert torch.equal(sampled(case, run_node, case.ours, node, cfg), base[node]), "and nothing stays"


def test_a_range_of_steps_equals_diffusers_by_either_sampler(case, run_node):
    with torch.inference_mode(False):
        expected = by_diffusers(case, 3.0, 0.25, 0.7)
    model = applied(case, run_node, start=0.25, end=0.7)
    for node in SAMPLERS:
        assert relative_l2(sampled(case, run_node, model, node), expected) <= PER_RUN, node


@pytest.mark.parametrize("before", [True, False], ids=["before", "behind"])
def test_a_model_sampling_node_counts_wherever_it_stands(case, run_node, before):
    """It moves the noise levels, and with them the steps of a range."""
    changed = SimpleNamespace(**vars(case))
    if before:
        changed.ours = shifted(case, run_node, case.ours)
    model = applied(changed, run_node, start=0.25, end=0.7)
    model = model if before else shifted(case, run_node, model)
    with torch.inference_mode(False):
        expected = by_diffusers(case, 3.0, 0.25, 0.7, model)
    for node in SAMPLERS:
        assert relative_l2(sampled(case, run_node, model, node), expected) <= PER_RUN, node


def shifted(case: SimpleNamespace, run_node: Any, model: Any) -> Any:
    """`model` behind the family's node for noise levels."""
    if case.options:
        widgets = {"max_shift": 2.0, "base_shift": 0.5, "width": 2048, "height": 2048}
        return run_node("ModelSamplingFlux", model=model, **widgets)[0]
    return run_node("ModelSamplingSD3", model=model, shift=8.0)[0]


def test_a_batch_of_odd_size_with_prompts_of_two_lengths(case, run_node):
    """Each picture alone is the same by either sampler and in a batch, whose rows are spread otherwise."""
    model, latent = applied(case, run_node), empty_latent(2, 9, 13)
    batch = [sampled(case, run_node, model, node, latent=latent, shorter=True) for node in SAMPLERS]
    assert relative_l2(*batch) <= PER_RUN
    alone = sampled(case, run_node, model, "KSampler", latent=empty_latent(1, 9, 13), shorter=True)
    assert relative_l2(batch[0][:1], alone) <= PER_RUN
    base = sampled(case, run_node, case.ours, "KSampler", latent=latent, shorter=True)
    assert relative_l2(batch[0], base) > 10 * PER_RUN


def test_two_models_of_one_file_in_turn_and_a_chain(case, run_node):
    """Each clone's own pictures count, whichever was sampled last."""
    weak, strong = applied(case, run_node, 0.2), applied(case, run_node, 0.8)
    twice = SimpleNamespace(**(vars(case) | {"ours": weak}))
    chained = applied(twice, run_node, 0.6)
    for node in SAMPLERS:
        results = [sampled(case, run_node, model, node) for model in (weak, strong, weak, chained)]
        assert torch.equal(results[0], results[2])
        assert relative_l2(results[0], results[1]) > 10 * PER_RUN
        assert relative_l2(results[3], results[1]) <= PER_RUN, "0.2 and 0.6 of one picture are 0.8 of it"


def test_weight_0_gives_the_same_model(case, run_node):
    assert applied(case, run_node, 0.0) is case.ours


def test_an_interrupt_leaves_the_ranks_warm(case, run_node, monkeypatch):
    import comfy.model_management as management

    from comfy_xdit.ranks.registry import running_groups
    from comfy_xdit.remote.model import RemoteModel

    model = applied(case, run_node)
    before = sampled(case, run_node, model, "KSampler")
    pids, denoise, calls = [list(group.pids) for group in running_groups()], RemoteModel.denoise, []

    def stopping(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        management.interrupt_current_processing(len(calls) == 2)
        return denoise(self, *args, **kwargs)

    monkeypatch.setattr(RemoteModel, "denoise", stopping)
    with pytest.raises(management.InterruptProcessingException):
        sampled(case, run_node, model, "KSampler")
    assert len(calls) < STEPS
    monkeypatch.undo()
    assert torch.equal(sampled(case, run_node, model, "KSampler"), before)
    assert [list(group.pids) for group in running_groups()] == pids


def test_what_is_wrong_is_an_error_of_the_node(case, run_node, comfyui):
    stock = SimpleNamespace(**(vars(case) | {"ours": case.stock}))
    with pytest.raises(InvalidInput, match="this one is a stock MODEL"):
        applied(stock, run_node)
    with pytest.raises(
        InvalidInput, match=r"no IP-Adapter .gone\.safetensors.; put it into models/ipadapter"
    ):
        run_node("XDiTIPAdapterLoader", ipadapter_name="gone.safetensors")
    names = comfyui.mappings["XDiTIPAdapterLoader"].INPUT_TYPES()["required"]["ipadapter_name"][0]
    assert case.file.name in names
    node = comfyui.mappings["XDiTIPAdapterLoader"]
    assert node.IS_CHANGED(ipadapter_name=case.file.name) == node.IS_CHANGED(ipadapter_name=case.file.name)


def test_a_guider_with_three_prompts_is_refused_by_name(case, run_node):
    if case.options:
        pytest.skip("one family is enough")
    sampling = {"positive": conditioning_for(case.config, 1), "negative": conditioning_for(case.config, 2)}
    (guider,) = run_node(
        "PerpNegGuider", model=applied(case, run_node), **sampling,
        empty_conditioning=conditioning_for(case.config, 3), cfg=3.0, neg_scale=1.0,
    )  # fmt: skip
    (noise,) = run_node("RandomNoise", noise_seed=1)
    (sampler,) = run_node("KSamplerSelect", sampler_name="euler")
    with pytest.raises(InvalidInput, match=r"the guider uses 3 prompts.*use CFGGuider"):
        run_node(
            "SamplerCustomAdvanced", noise=noise, guider=guider, sampler=sampler,
            sigmas=torch.tensor([1.0, 0.5, 0.0]), latent_image=empty_latent(1, HEIGHT, WIDTH),
        )  # fmt: skip
