"""The shipped LoRA and ControlNet do to the demo model's pictures what they should, under every method."""

from __future__ import annotations

import random

import check_demo_pictures
import numpy as np
import pytest
from check_demo_pictures import (
    FOLLOWED,
    edge_overlap,
    has_frame,
    held_out_captions,
    judge,
    score,
    without_frame,
)
from demo_pictures import (
    COLOURS,
    FRAME_WIDTH,
    Place,
    Scene,
    all_scenes,
    border_ring,
    caption_of,
    draw_at,
    draw_edges,
    draw_picture,
    place_near,
)
from diffusers import SD3ControlNetModel
from PIL import Image
from train_demo_controlnet import CFG as NET_CFG
from train_demo_controlnet import EXAMPLE, held_out_tasks, overlaps
from train_demo_model import load_demo_model

from comfy_xdit.demo_files import FILES
from comfy_xdit.headless.workflow import run_file
from comfy_xdit.protocol.parallel import ParallelConfig
from comfy_xdit.ranks.environment import ROOT
from tests.test_demo_quality import draw

CAPTIONS = held_out_captions()[:30]
(LORA,), (NET,) = FILES["loras"], FILES["controlnet"]
LEAST_OVERLAP, LEAST_FOLLOWED = 0.85, 0.9
API = ROOT / "workflows" / "api"
ONE_RANK = ("1.strategy=manual", "1.devices=cpu")
LAYOUTS = {
    "one rank": ParallelConfig(),
    "ulysses 2": ParallelConfig(ulysses_degree=2),
    "ring 2": ParallelConfig(ring_degree=2),
    "ulysses 2 x ring 2": ParallelConfig(ulysses_degree=2, ring_degree=2),
    "cfg 2": ParallelConfig(cfg_parallel_degree=2),
    "data 2": ParallelConfig(data_parallel_degree=2),
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


@pytest.fixture(scope="module")
def tasks() -> tuple[list[str], list[np.ndarray]]:
    """30 captions that no training picture had, and edges beside the places that they name."""
    captions, edges = zip(*held_out_tasks(), strict=True)
    return list(captions), list(edges)


# PipeFusion refuses ControlNets that run in the ranks.
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "pipefusion 2"])
def test_shapes_follow_the_edges(layout, tasks, capsys):
    captions, edges = tasks
    pictures = draw(captions, LAYOUTS[layout], net=NET, hints=edges, cfg=NET_CFG)
    found = np.array([edge_overlap(*pair) for pair in zip(edges, pictures, strict=True)])
    content = score(captions, pictures)
    with capsys.disabled():
        print(f"\n{layout}: {said(found)}  {content}", end="")
    assert found.mean() >= LEAST_OVERLAP
    assert (found >= FOLLOWED).mean() >= LEAST_FOLLOWED
    assert content.colour >= 0.9 and content.background >= 0.9, content


def test_without_the_controlnet_they_do_not(tasks, capsys):
    captions, edges = tasks
    found = np.array(
        [
            edge_overlap(*pair)
            for pair in zip(edges, draw(captions, ParallelConfig(), cfg=NET_CFG), strict=True)
        ]
    )
    with capsys.disabled():
        print(f"\nwithout: {said(found)}", end="")
    assert found.mean() <= LEAST_OVERLAP - 0.2
    assert (found >= FOLLOWED).mean() <= 0.2


def said(found: np.ndarray) -> str:
    """Intersections over union in words."""
    share = 100 * (found >= FOLLOWED).mean()
    return f"IoU {found.mean():.3f}, lowest {found.min():.2f}, {share:.1f} % at least {FOLLOWED}"


def test_the_file_is_what_diffusers_loads_and_its_pictures_follow_edges_there(tasks):
    """The shipped folder in diffusers' own pipeline: the reference for what the ranks draw."""
    pipeline = load_demo_model(ROOT / "assets" / "demo")
    controlnet = SD3ControlNetModel.from_pretrained(ROOT / "assets" / "demo" / "controlnet").float()
    assert overlaps(pipeline, controlnet).mean() >= LEAST_OVERLAP


def test_the_controlnet_workflow_draws_the_shape_in_the_edges(tmp_path):
    drawn = picture(API / "demo_controlnet.json", tmp_path)
    with Image.open(ROOT / "assets" / "demo" / EXAMPLE) as image:
        edges = np.asarray(image)
    assert edge_overlap(edges, drawn) >= FOLLOWED
    judged = judge("a yellow triangle on a purple background", drawn)
    assert judged["shape"] and judged["colour"] and judged["background"]
    nets = [f"{node}.strength=0" for node in ("12", "13")]
    assert edge_overlap(edges, picture(API / "demo_controlnet.json", tmp_path, *nets)) < FOLLOWED


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


def test_the_checker_measures_how_edges_are_filled():
    rng = random.Random(4)
    for scene in rng.sample(all_scenes(), 40):
        place = place_near(scene, rng)
        edges = draw_edges(scene.shape, place)
        assert edge_overlap(edges, draw_at(scene, place, rng)) >= 0.8
        assert edge_overlap(edges, draw_at(scene, Place(place.x, place.y, place.radius / 2), rng)) < 0.4
        assert edge_overlap(edges, np.full((128, 128, 3), 200, np.uint8)) == 0


def test_the_command_line_asks_for_the_edges(tmp_path, capsys):
    scene, place = Scene("red", "circle", None, "blue", None), Place(50, 80, 25)
    paths = [str(tmp_path / name) for name in ("picture.png", "edges.png")]
    Image.fromarray(draw_edges("circle", place)).save(paths[1])
    for x, status in ((50, 0), (70, 1)):
        Image.fromarray(draw_at(scene, Place(x, 80, 25), random.Random(5))).save(paths[0])
        words = "a large red circle at the top on a blue background"
        assert check_demo_pictures.main([paths[0], words, "--edges", paths[1]]) == status
    assert "edges: WRONG" in capsys.readouterr().out
