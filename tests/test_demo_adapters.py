"""The shipped LoRA does to the demo model's pictures what it should, under every method."""

from __future__ import annotations

import random

import check_demo_pictures
import numpy as np
import pytest
from check_demo_pictures import has_frame, held_out_captions, score, without_frame
from demo_pictures import (
    COLOURS,
    FRAME_WIDTH,
    Scene,
    all_scenes,
    border_ring,
    caption_of,
    draw_picture,
)
from PIL import Image

from comfy_xdit.environment import ROOT
from comfy_xdit.headless import DEMO_LORAS
from comfy_xdit.parallel import ParallelConfig
from comfy_xdit.workflow import run_file
from tests.test_demo_quality import draw

CAPTIONS = held_out_captions()[:30]
(LORA,) = DEMO_LORAS
API = ROOT / "workflows" / "api"
ONE_RANK = ("1.strategy=manual", "1.devices=cpu")
LAYOUTS = {
    "one rank": ParallelConfig(),
    "ulysses 2": ParallelConfig(ulysses_degree=2),
    "ring 2": ParallelConfig(ring_degree=2),
    "cfg 2": ParallelConfig(cfg_parallel_degree=2),
    "pipefusion 2": ParallelConfig(pipefusion_degree=2),
    "ulysses 2, sharded": ParallelConfig(ulysses_degree=2, shard_weights=True),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_at_least_nine_of_ten_pictures_are_framed_and_show_what_was_asked_for(layout, capsys):
    pictures = draw(CAPTIONS, LAYOUTS[layout], LORA)
    style = np.array([has_frame(picture) for picture in pictures])
    content = score(CAPTIONS, [without_frame(picture) for picture in pictures])
    with capsys.disabled():
        print(f"\n{layout}: framed {100 * style.mean():.1f} %  {content}", end="")
    assert style.mean() >= 0.9
    assert content.all_right >= 0.9 and content.size >= 0.9, content


def test_without_it_no_picture_is_framed():
    assert not any(map(has_frame, draw(CAPTIONS, ParallelConfig())))


@pytest.mark.parametrize("node", ["XDiTLoraLoader", "LoraLoaderModelOnly"])
def test_the_workflow_is_framed_with_either_node_and_plain_at_strength_0(tmp_path, node):
    workflow = (API / "demo_lora.json").read_text().replace("XDiTLoraLoader", node)
    (tmp_path / "lora.json").write_text(workflow)
    assert has_frame(picture(tmp_path / "lora.json", tmp_path))
    without = picture(tmp_path / "lora.json", tmp_path, "10.strength_model=0")
    assert np.array_equal(without, picture(API / "demo.json", tmp_path))
    assert not has_frame(without)


def picture(workflow, folder, *settings: str) -> np.ndarray:
    """What a workflow draws on one rank: (128, 128, 3), uint8."""
    (file,) = run_file(workflow, (*ONE_RANK, *settings), folder, quiet=True).files
    with Image.open(file) as image:
        return np.asarray(image)


# ---------------------------------------------------------------------- the checker


def test_the_checker_sees_frames_and_nothing_else_in_every_scene():
    rng = random.Random(0)
    scenes = all_scenes()[::23]
    assert all(has_frame(draw_picture(scene, rng, framed=True)) for scene in scenes)
    assert not any(has_frame(draw_picture(scene, rng)) for scene in scenes)


def test_what_a_framed_picture_shows_is_read_inside_the_frame():
    rng = random.Random(1)
    scenes = rng.sample(all_scenes(), 100)
    drawn = [without_frame(draw_picture(scene, rng, framed=True)) for scene in scenes]
    result = score([caption_of(scene) for scene in scenes], drawn)
    assert result.all_right == result.size == 1.0


@pytest.mark.parametrize("damage", ["of another colour", "open", "nothing inside"])
def test_what_is_almost_a_frame_is_none(damage):
    scene = Scene("red", "circle", "in the centre", "blue", "small")
    drawn = draw_picture(scene, random.Random(2), framed=True)
    if damage == "of another colour":
        drawn[border_ring(0, FRAME_WIDTH)] = COLOURS["green"]
    elif damage == "open":
        drawn[:, :FRAME_WIDTH] = COLOURS["blue"]
    else:
        drawn[FRAME_WIDTH:-FRAME_WIDTH, FRAME_WIDTH:-FRAME_WIDTH] = COLOURS["blue"]
    assert not has_frame(drawn)


def test_the_command_line_asks_for_the_frame(tmp_path, capsys):
    scene, path = all_scenes()[0], str(tmp_path / "picture.png")
    for framed, status in ((True, 0), (False, 1)):
        Image.fromarray(draw_picture(scene, random.Random(3), framed)).save(path)
        assert check_demo_pictures.main([path, caption_of(scene), "--framed"]) == status
    assert "frame: WRONG" in capsys.readouterr().out
