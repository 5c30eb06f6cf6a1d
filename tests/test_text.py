"""Text encoders against plain diffusers, and the rules diffusers does not have."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.spec import ModelSpec
from tests import tiny
from worker.text.encoders import TextEncoders
from worker.text.layout import Layout, joined, lay

PIPELINE = Path(__file__).parent.parent / "assets" / "demo" / "pipeline"
PROMPT = "a small red circle on the left on a blue background"
IN_ROWS = Layout(head=(100,), tail=(101,), pad=102, least=10, most=10, further=True)


@pytest.fixture(scope="module")
def encoders():
    encoders = TextEncoders(ModelSpec.of(PIPELINE, "text_encoders"), torch.device("cpu"))
    encoders.load()
    return encoders


def encode(encoders, *parts: tuple[str, float]):
    with torch.inference_mode():
        return encoders.encode({name: [list(parts)] for name in ("l", "g")})


def test_a_plain_prompt_equals_diffusers(encoders):
    from diffusers import StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline.from_pretrained(PIPELINE, text_encoder_3=None, tokenizer_3=None)
    pipeline.to(torch.float32)
    with torch.no_grad():
        context, _, pooled, _ = pipeline.encode_prompt(
            PROMPT, None, None, do_classifier_free_guidance=False, max_sequence_length=0
        )
    ours = encode(encoders, (PROMPT, 1.0))
    assert tiny.relative_l2(ours["cond"], context) <= 1e-6
    assert tiny.relative_l2(ours["pooled"], pooled) <= 1e-6


def test_a_weight_scales_the_distance_to_the_empty_prompt(encoders):
    plain, empty = encode(encoders, (PROMPT, 1.0))["cond"], encode(encoders, ("", 1.0))["cond"]
    weighted = encode(
        encoders, ("a small", 1.0), ("red", 1.5), ("circle on the left on a blue background", 1.0)
    )
    place = 1 + 2  # start, "a", "small"
    expected = plain.clone()
    expected[:, place] = empty[:, place] + 1.5 * (plain[:, place] - empty[:, place])
    assert tiny.relative_l2(weighted["cond"], expected) <= 1e-6
    assert torch.equal(weighted["pooled"], encode(encoders, (PROMPT, 1.0))["pooled"])


def test_a_long_prompt_takes_more_chunks(encoders):
    length = encode(encoders, (PROMPT, 1.0))["cond"].shape[1]
    assert encode(encoders, (" ".join([PROMPT] * 4), 1.0))["cond"].shape[1] == length * 4


def tokens(*ids: int) -> list[tuple[int, float]]:
    return [(i, 1.0) for i in ids]


def test_rows_have_special_tokens_and_padding():
    laid = lay([tokens(1, 2)], IN_ROWS)
    assert laid.rows == [tokens(100, 1, 2, 101, *[102] * 6)]
    assert (laid.filled, laid.left_out) == ([4], [])
    assert lay([], IN_ROWS).rows == [tokens(100, 101, *[102] * 8)]


def test_a_short_group_moves_whole_and_a_long_one_is_cut():
    short = lay([tokens(*range(6)), tokens(20, 21, 22)], IN_ROWS)
    assert short.rows == [tokens(100, *range(6), 101, 102, 102), tokens(100, 20, 21, 22, 101, *[102] * 5)]
    assert short.filled == [8, 5]
    long = lay([tokens(*range(12))], IN_ROWS)
    assert long.rows == [tokens(100, *range(8), 101), tokens(100, *range(8, 12), 101, *[102] * 4)]


def test_one_row_of_any_length_and_one_that_is_cut():
    any_length = Layout(head=(), tail=(1,), pad=0, least=6)
    assert lay([tokens(7, 8)], any_length).rows == [tokens(7, 8, 1, 0, 0, 0)]
    assert len(lay([tokens(*range(500))], any_length).rows[0]) == 501
    cut = lay([tokens(7, 8), tokens(9, 10)], Layout(head=(), tail=(1,), pad=0, least=4, most=4))
    assert (cut.rows, cut.filled, cut.left_out) == ([tokens(7, 8, 9, 1)], [4], [10])


def test_parts_of_one_weight_are_one_text_and_a_space_belongs_to_the_next_word():
    parts = [("a ", 1.0), ("red", 1.0), (" big ", 1.5), ("circle ", 1.0)]
    assert joined(parts) == [("a red", 1.0), (" big", 1.5), (" circle ", 1.0)]
    assert joined([("a ", 1.0), ("red ", 1.5), ("b", 1.0)]) == [("a", 1.0), (" red", 1.5), (" b", 1.0)]
    assert joined([]) == []


def test_a_prompt_that_is_no_text_is_named(encoders):
    with pytest.raises(InvalidInput, match="prompt for l is int"):
        encoders.encode({"l": [[(5, 1.0)]]})
