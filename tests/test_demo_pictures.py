"""The demo checker must see what is in a drawn picture, and must see when it is wrong."""

from __future__ import annotations

import random
from dataclasses import replace

import check_demo_pictures
import numpy as np
import pytest
from check_demo_pictures import held_out_captions, judge, read_picture, score
from demo_pictures import (
    COLOURS,
    POSITIONS,
    SHAPES,
    SIZES,
    Scene,
    all_scenes,
    caption_of,
    draw_picture,
    held_out_scenes,
    parse_caption,
    training_scenes,
)
from PIL import Image

SCENE = Scene("red", "circle", "on the left", "blue", "small")


def blank(colour: str) -> np.ndarray:
    return np.full((128, 128, 3), COLOURS[colour], np.uint8)


def test_every_drawn_picture_is_read_right():
    rng = random.Random(0)
    scenes = rng.sample(all_scenes(), 400)
    result = score([caption_of(s) for s in scenes], [draw_picture(s, rng) for s in scenes])
    assert result.all_right == result.size == 1.0


def test_noise_and_other_sizes_do_not_disturb_the_reading():
    rng, noise = random.Random(1), np.random.default_rng(1)
    scenes = rng.sample(all_scenes(), 100)
    noisy = [draw_picture(s, rng) + noise.normal(0, 15, (128, 128, 3)) for s in scenes]
    pictures = [np.clip(p, 0, 255).astype(np.uint8) for p in noisy]
    doubled = [np.asarray(Image.fromarray(p).resize((256, 256))) for p in pictures]
    captions = [caption_of(s) for s in scenes]
    assert score(captions, pictures).all_right == 1.0
    assert score(captions, doubled).all_right == 1.0


@pytest.mark.parametrize(
    ("attribute", "values"),
    [
        ("colour", COLOURS),
        ("shape", SHAPES),
        ("position", POSITIONS),
        ("background", COLOURS),
        ("size", SIZES),
    ],
)
def test_a_picture_wrong_in_one_attribute_fails_in_that_one_only(attribute, values):
    taken = (SCENE.colour, SCENE.background)
    for value in values:
        if value in taken or value == getattr(SCENE, attribute):
            continue
        wrong = draw_picture(replace(SCENE, **{attribute: value}), random.Random(2))
        verdict = judge(caption_of(SCENE), wrong)
        assert [name for name, right in verdict.items() if not right] == [attribute], value


def test_a_picture_of_nothing_shows_nothing():
    reading = read_picture(blank("blue"))
    assert reading.background == "blue"
    assert {reading.colour, reading.shape, reading.position, reading.size} == {None}
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3)).astype(np.uint8)
    assert score([caption_of(SCENE)], [noise]).all_right == 0.0


def test_a_shape_in_a_corner_has_no_position():
    picture = blank("blue")
    picture[:30, :30] = COLOURS["red"]
    assert read_picture(picture).position is None


def test_a_blot_has_no_shape():
    picture = blank("blue")
    picture[20:22, 20:100] = picture[20:100, 20:22] = COLOURS["red"]
    assert read_picture(picture).shape is None


def test_score_counts_shares():
    right = draw_picture(SCENE, random.Random(3))
    wrong = draw_picture(replace(SCENE, size="large"), random.Random(3))
    result = score([caption_of(SCENE)] * 2, [right, wrong])
    assert (result.size, result.shape, result.all_right) == (0.5, 1.0, 1.0)
    with pytest.raises(ValueError, match="2 captions for 1 pictures"):
        score(["a red circle"] * 2, [right])


def test_captions_and_scenes_are_the_same_thing():
    assert caption_of(SCENE) == "a small red circle on the left on a blue background"
    assert all(parse_caption(caption_of(scene)) == scene for scene in all_scenes())
    assert parse_caption("A red circle, at the top") == parse_caption("a red circle at the top")
    open_scene = parse_caption("an orange cross")
    assert open_scene == Scene("orange", "cross")
    assert caption_of(open_scene) == "an orange cross"
    with pytest.raises(ValueError, match="pink"):
        parse_caption("a pink elephant")


def test_what_a_caption_leaves_open_is_always_right():
    picture = draw_picture(SCENE, random.Random(4))
    assert all(judge("a red circle", picture).values())
    assert not judge("a red circle on a green background", picture)["background"]


def test_held_out_captions_are_fixed_and_not_trained():
    captions = held_out_captions()
    assert len(set(captions)) == 50
    assert captions[0] == "a large blue cross at the top on a black background"
    assert not set(held_out_scenes()) & set(training_scenes())


def test_command_line_tells_right_from_wrong(tmp_path, capsys):
    path = tmp_path / "picture.png"
    Image.fromarray(draw_picture(SCENE, random.Random(5))).save(path)
    assert check_demo_pictures.main([str(path), caption_of(SCENE)]) == 0
    assert check_demo_pictures.main([str(path), "a red square"]) == 1
    assert "shape: WRONG" in capsys.readouterr().out
