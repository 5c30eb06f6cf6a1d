"""Prompt weights: ComfyUI's syntax, its corners, and what is left as plain text."""

import pytest

from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.remote.prompt import parse_weights


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("", [("", 1.0)]),
        ("a cat", [("a cat", 1.0)]),
        ("a (cat:1.3) sits", [("a ", 1.0), ("cat", 1.3), (" sits", 1.0)]),
        ("(cat)", [("cat", 1.1)]),
        ("((cat))", [("cat", 1.1 * 1.1)]),
        ("((cat:1.3))", [("cat", 1.3)]),  # a number is absolute, however deep it stands
        ("(a (red:1.5) cat:0.8)", [("a ", 0.8), ("red", 1.5), (" cat", 0.8)]),
        ("((red) cat:2)", [("red", 2 * 1.1), (" cat", 2.0)]),
        ("(cat:-0.5)", [("cat", -0.5)]),
        ("(ratio 16:9)", [("ratio 16", 9.0)]),
        ("(mood: dark)", [("mood: dark", 1.1)]),
        ("(:1.3)", [(":1.3", 1.1)]),
    ],
)
def test_weights(text, pieces):
    parsed = parse_weights(text)
    assert [piece for piece, _ in parsed] == [piece for piece, _ in pieces]
    assert [weight for _, weight in parsed] == pytest.approx([weight for _, weight in pieces])


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        (r"a cat \(sitting\)", "a cat (sitting)"),
        (r"C:\folder", r"C:\folder"),
        ("a cat :)", "a cat :)"),
        ("(a cat", "(a cat"),
        ("a) then (quiet)", "a) then (quiet)"),
    ],
)
def test_plain_text(text, plain):
    assert parse_weights(text) == [(plain, 1.0)]


def test_escaped_parentheses_within_a_weight():
    assert parse_weights(r"(cat \(small\):1.2)") == [("cat (small)", 1.2)]


def test_no_text_is_lost():
    text = "one (two (three:1.2) four) ((five)) six"
    assert "".join(piece for piece, _ in parse_weights(text)) == "one two three four five six"


@pytest.mark.parametrize("number", ["inf", "-inf", "nan", "1e999"])
def test_a_weight_that_is_no_finite_number_is_refused(number):
    with pytest.raises(InvalidInput, match="not a finite number"):
        parse_weights(f"(cat:{number})")
