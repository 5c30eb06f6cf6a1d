"""Stock nodes that act around the transformer: the same latent as with the stock MODEL.

Each entry of GRAPHS is what a graph has between loader and sampler, or in the sampler's place.
"""

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.comfyui.inputs import (
    FAMILIES,
    empty_latent,
    pair,
    random_conditioning,
    random_latent,
    relative_l2,
)

PER_RUN = 1e-4
STEPS = 4
SIZE = (10, 13)  # latent pixels

RunNode = Callable[..., tuple[Any, ...]]


class Graph(SimpleNamespace):
    """A graph in the making: `node` runs one, the rest are its wires."""

    def node(self, name: str, **inputs: Any) -> Any:
        """The first output of a stock node. The test is skipped where this ComfyUI has no such node."""
        if name not in self.mappings:
            pytest.skip(f"this ComfyUI has no {name}")
        return self.run_node(name, **inputs)[0]

    def change_model(self, name: str, **inputs: Any) -> None:
        """Put a node between loader and sampler."""
        self.model = self.node(name, model=self.model, **inputs)

    def change_prompts(self, name: str, **inputs: Any) -> None:
        """Put a node behind both prompts."""
        self.positive, self.negative = (
            self.node(name, conditioning=prompt, **inputs) for prompt in (self.positive, self.negative)
        )

    def sample(self, **settings: Any) -> torch.Tensor:
        """The latent that KSampler draws."""
        defaults = {
            "seed": 7, "steps": STEPS, "cfg": 3.0, "sampler_name": "euler", "scheduler": "simple",
            "denoise": 1.0,
        }  # fmt: skip
        wires = {"positive": self.positive, "negative": self.negative, "latent_image": self.latent}
        return self.node("KSampler", model=self.model, **(defaults | wires | settings))["samples"]

    def sample_by(self, guider: Any, sampler: Any = None) -> torch.Tensor:
        """The latent that SamplerCustomAdvanced draws."""
        return self.node(
            "SamplerCustomAdvanced",
            noise=self.node("RandomNoise", noise_seed=7),
            guider=guider,
            sampler=sampler or self.node("KSamplerSelect", sampler_name="dpmpp_2m"),
            sigmas=self.node("BasicScheduler", model=self.model, scheduler="beta", steps=STEPS, denoise=1.0),
            latent_image=self.latent,
        )["samples"]


def changed_model(name: str, **inputs: Any) -> Callable[[Graph], torch.Tensor]:
    """KSampler behind one node that takes and gives a MODEL."""

    def run(graph: Graph) -> torch.Tensor:
        graph.change_model(name, **inputs)
        return graph.sample()

    return run


def changed_prompts(name: str, **inputs: Any) -> Callable[[Graph], torch.Tensor]:
    """KSampler with one node behind both prompts."""

    def run(graph: Graph) -> torch.Tensor:
        graph.change_prompts(name, **inputs)
        return graph.sample()

    return run


def custom_advanced(graph: Graph) -> torch.Tensor:
    return graph.sample_by(
        graph.node("CFGGuider", model=graph.model, positive=graph.positive, negative=graph.negative, cfg=3.0)
    )


def basic_guider(graph: Graph) -> torch.Tensor:
    return graph.sample_by(graph.node("BasicGuider", model=graph.model, conditioning=graph.positive))


def dual_guider(graph: Graph) -> torch.Tensor:
    return graph.sample_by(
        graph.node(
            "DualCFGGuider",
            model=graph.model,
            cond1=graph.positive,
            cond2=graph.other,
            negative=graph.negative,
            cfg_conds=3.0,
            cfg_cond2_negative=2.0,
            style="regular",
        )
    )


def perp_neg_guider(graph: Graph) -> torch.Tensor:
    return graph.sample_by(
        graph.node(
            "PerpNegGuider",
            model=graph.model,
            positive=graph.positive,
            negative=graph.negative,
            empty_conditioning=graph.other,
            cfg=3.0,
            neg_scale=0.7,
        )
    )


def third_party_sampler(graph: Graph) -> torch.Tensor:
    """A pack's own sampler: two calls of the model per step, and a callback."""
    from comfy.samplers import KSAMPLER

    def midpoint(model, x, sigmas, extra_args=None, callback=None, disable=None):
        for i, (sigma, following) in enumerate(itertools.pairwise(sigmas)):
            middle = (sigma + following) / 2
            slope = (x - model(x, sigma * x.new_ones(len(x)), **extra_args)) / sigma
            ahead = x + slope * (middle - sigma)
            slope = (ahead - model(ahead, middle * x.new_ones(len(x)), **extra_args)) / middle
            x = x + slope * (following - sigma)
            callback({"x": x, "i": i, "sigma": sigma, "sigma_hat": sigma, "denoised": x})
        return x

    guider = graph.node(
        "CFGGuider", model=graph.model, positive=graph.positive, negative=graph.negative, cfg=3.0
    )
    return graph.sample_by(guider, KSAMPLER(midpoint))


def split_run(graph: Graph) -> torch.Tensor:
    """KSamplerAdvanced twice, the second from the noise that is left."""
    shared = {
        "model": graph.model, "noise_seed": 7, "steps": STEPS, "cfg": 3.0, "sampler_name": "euler",
        "scheduler": "simple", "positive": graph.positive, "negative": graph.negative,
    }  # fmt: skip
    half = graph.node(
        "KSamplerAdvanced", add_noise="enable", latent_image=graph.latent, start_at_step=0, end_at_step=2,
        return_with_leftover_noise="enable", **shared,
    )  # fmt: skip
    return graph.node(
        "KSamplerAdvanced", add_noise="disable", latent_image=half, start_at_step=2, end_at_step=STEPS,
        return_with_leftover_noise="disable", **shared,
    )["samples"]  # fmt: skip


def differential_diffusion(graph: Graph) -> torch.Tensor:
    graph.change_model("DifferentialDiffusion")
    graph.latent = {
        "samples": random_latent(1, *SIZE),
        "noise_mask": torch.linspace(0, 1, 8 * SIZE[1]).expand(1, 8 * SIZE[0], -1),
    }
    return graph.sample()


def masked_prompt(graph: Graph) -> torch.Tensor:
    mask = torch.zeros(1, 8 * SIZE[0], 8 * SIZE[1])
    mask[:, :40, 24:] = 1.0
    other = graph.node(
        "ConditioningSetMask", conditioning=graph.other, mask=mask, strength=0.8, set_cond_area="mask bounds"
    )
    graph.positive = graph.node("ConditioningCombine", conditioning_1=graph.positive, conditioning_2=other)
    return graph.sample()


def prompt_for_a_part_of_the_run(graph: Graph) -> torch.Tensor:
    first = graph.node("ConditioningSetTimestepRange", conditioning=graph.positive, start=0.0, end=0.5)
    second = graph.node("ConditioningSetTimestepRange", conditioning=graph.other, start=0.5, end=1.0)
    graph.positive = graph.node("ConditioningCombine", conditioning_1=first, conditioning_2=second)
    return graph.sample()


def averaged_prompt(graph: Graph) -> torch.Tensor:
    graph.positive = graph.node(
        "ConditioningAverage", conditioning_to=graph.positive, conditioning_from=graph.other,
        conditioning_to_strength=0.4,
    )  # fmt: skip
    return graph.sample()


def zeroed_negative(graph: Graph) -> torch.Tensor:
    graph.negative = graph.node("ConditioningZeroOut", conditioning=graph.negative)
    return graph.sample()


def two_model_nodes(graph: Graph) -> torch.Tensor:
    graph.change_model("ModelSamplingSD3", shift=5.0)
    graph.change_model("RescaleCFG", multiplier=0.7)
    return graph.sample(sampler_name="dpmpp_2m_sde", scheduler="karras")


GRAPHS: dict[str, Callable[[Graph], torch.Tensor]] = {
    "ModelSamplingSD3": changed_model("ModelSamplingSD3", shift=5.0),
    "ModelSamplingFlux": changed_model(
        "ModelSamplingFlux", max_shift=1.15, base_shift=0.5, width=1024, height=768
    ),
    "ModelSamplingAuraFlow": changed_model("ModelSamplingAuraFlow", shift=1.7),
    "RescaleCFG": changed_model("RescaleCFG", multiplier=0.7),
    "CFGZeroStar": changed_model("CFGZeroStar"),
    "CFGNorm": changed_model("CFGNorm", strength=0.9),
    "Mahiro": changed_model("Mahiro"),
    "APG": changed_model("APG", eta=0.8, norm_threshold=4.0, momentum=0.2),
    "TCFG": changed_model("TCFG"),
    "FreSca": changed_model("FreSca", scale_low=0.9, scale_high=1.3, freq_cutoff=2),
    "Epsilon Scaling": changed_model("Epsilon Scaling", scaling_factor=1.01),
    "TemporalScoreRescaling": changed_model("TemporalScoreRescaling", tsr_k=0.95, tsr_sigma=1.0),
    "EasyCache": changed_model(
        "EasyCache", reuse_threshold=0.5, start_percent=0.1, end_percent=0.95, verbose=False
    ),
    "LazyCache": changed_model(
        "LazyCache", reuse_threshold=0.5, start_percent=0.1, end_percent=0.95, verbose=False
    ),
    "FluxGuidance": changed_prompts("FluxGuidance", guidance=2.0),
    "FluxDisableGuidance": changed_prompts("FluxDisableGuidance"),
    "CFGGuider": custom_advanced,
    "BasicGuider": basic_guider,
    "DualCFGGuider": dual_guider,
    "PerpNegGuider": perp_neg_guider,
    "third-party sampler": third_party_sampler,
    "KSamplerAdvanced": split_run,
    "DifferentialDiffusion": differential_diffusion,
    "ConditioningSetMask": masked_prompt,
    "ConditioningSetTimestepRange": prompt_for_a_part_of_the_run,
    "ConditioningAverage": averaged_prompt,
    "ConditioningZeroOut": zeroed_negative,
    "two nodes": two_model_nodes,
}


@pytest.fixture(params=FAMILIES)
def models(request, run_node, degrees) -> SimpleNamespace:
    """The same random file, loaded by ComfyUI and into the ranks."""
    return pair(run_node, request.getfixturevalue(f"tiny_{request.param}"), degrees)


@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_draws_what_it_draws_with_the_stock_model(comfyui, run_node, models, name):
    def draw(model: Any) -> torch.Tensor:
        graph = Graph(
            run_node=run_node,
            mappings=comfyui.mappings,
            model=model,
            latent=empty_latent(1, *SIZE),
            positive=random_conditioning(models.ours, 1),
            negative=random_conditioning(models.ours, 2),
            other=random_conditioning(models.ours, 5),
        )
        return GRAPHS[name](graph)

    expected = draw(models.stock)
    assert expected.isfinite().all()
    assert relative_l2(draw(models.ours), expected) <= PER_RUN
