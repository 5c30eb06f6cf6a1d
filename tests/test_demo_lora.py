"""The shipped demo LoRA draws outlines of what the prompt says, under every method; nothing else does."""

from __future__ import annotations

import random

import numpy as np
import pytest
from check_demo_pictures import held_out_captions, is_outlined, score
from demo_pictures import all_scenes, draw_picture

from comfy_xdit.environment import ROOT
from comfy_xdit.headless import DEMO_LORAS
from comfy_xdit.parallel import ParallelConfig
from comfy_xdit.workflow import run_file
from tests.test_demo_quality import draw

CAPTIONS = held_out_captions()[:30]
(LORA,) = DEMO_LORAS
LAYOUTS = {
    "one rank": ParallelConfig(),
    "ulysses 2": ParallelConfig(ulysses_degree=2),
    "ring 2": ParallelConfig(ring_degree=2),
    "cfg 2": ParallelConfig(cfg_parallel_degree=2),
    "cfg 2 x ulysses 2": ParallelConfig(cfg_parallel_degree=2, ulysses_degree=2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_at_least_nine_of_ten_pictures_are_outlines_of_what_was_asked_for(layout, capsys):
    pictures = draw(CAPTIONS, LAYOUTS[layout], LORA)
    outlined, right = float(np.mean([is_outlined(p) for p in pictures])), score(CAPTIONS, pictures)
    with capsys.disabled():
        print(f"\n{layout}: outlined {100 * outlined:.1f} %  {right}", end="")
    assert outlined >= 0.9
    assert right.colour >= 0.9 and right.background >= 0.9 and right.position >= 0.9, right


def test_without_it_no_picture_is_an_outline():
    assert not any(map(is_outlined, draw(CAPTIONS, ParallelConfig())))


def test_the_checker_tells_outlines_from_shapes():
    rng = random.Random(0)
    scenes = rng.sample(all_scenes(), 200)
    assert all(is_outlined(draw_picture(scene, rng, hole=0.5)) for scene in scenes)
    assert not any(is_outlined(draw_picture(scene, rng)) for scene in scenes)


@pytest.mark.parametrize("node", ["XDiTLoraLoader", "LoraLoaderModelOnly"])
def test_the_workflow_draws_an_outline_with_either_node(tmp_path, node):
    workflow = (ROOT / "workflows" / "api" / "demo_lora.json").read_text().replace("XDiTLoraLoader", node)
    (tmp_path / "lora.json").write_text(workflow)

    def picture(*settings: str) -> np.ndarray:
        one = ("1.strategy=manual", "1.devices=cpu")
        (image,) = run_file(tmp_path / "lora.json", (*one, *settings), tmp_path, quiet=True).outputs["8"]
        return (image[0] * 255).round().byte().numpy()

    assert is_outlined(picture())
    assert not is_outlined(picture("10.strength_model=0"))
