"""Prompt weights as ComfyUI writes them: `(word:1.3)`, `((word))`, and `\\(` for a plain parenthesis."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from comfy_xdit.protocol.errors import InvalidInput

EMPHASIS = 1.1  # what one pair of parentheses without a number multiplies the weight by
_PARENTHESIS = re.compile(r"\\[()]|[()]")
_EMBEDDING = re.compile(r"\bembedding:\S+")
_ESCAPED = re.compile(r"\\([()])")


def parse_weights(text: str) -> list[tuple[str, float]]:
    """Split a prompt into pieces of one weight each, in their order.

    A number stands for itself wherever it is nested: in `((a:1.3))` the weight of `a` is 1.3.
    Parentheses that do not match, and numbers that are none, are plain text. An empty prompt is
    one empty piece of weight 1.

    Raises:
        InvalidInput: a weight is infinite or not a number.
    """
    pieces = [(_ESCAPED.sub(r"\1", piece), weight) for piece, weight in _pieces(text, 1.0)]
    return pieces or [("", 1.0)]


def refuse_embeddings(text: str) -> None:
    """Raise InvalidInput for a prompt that names a textual inversion embedding."""
    if embedding := _EMBEDDING.search(text):
        raise InvalidInput(
            f"{embedding.group()!r}: textual inversion embeddings are not in this version of comfy_xdit; "
            "take it out of the prompt, or use a stock CLIP in ComfyUI."
        )


def _pieces(text: str, weight: float) -> Iterator[tuple[str, float]]:
    for piece, grouped in _split(text):
        if grouped:
            yield from _pieces(*_emphasis(piece[1:-1], weight))
        else:
            yield piece, weight


def _emphasis(inner: str, weight: float) -> tuple[str, float]:
    """What stands between two parentheses, without its number, and its weight."""
    words, colon, number = inner.rpartition(":")
    if colon and words:
        try:
            value = float(number)
        except ValueError:
            pass
        else:
            if not math.isfinite(value):
                raise InvalidInput(
                    f"prompt weight {number.strip()!r} in '({inner})' is not a finite number; "
                    "write one such as 1.2, or \\( and \\) for plain parentheses."
                )
            return words, value
    return inner, weight * EMPHASIS


def _split(text: str) -> Iterator[tuple[str, bool]]:
    """The outermost pieces of `text` that are not empty, each with: is it in parentheses?"""
    start = depth = 0
    closed_at = -1  # end of the last parenthesis that counts
    for match in _PARENTHESIS.finditer(text):
        if match.group() == "(":
            if depth == 0:
                if match.start() > start:
                    yield text[start : match.start()], False
                start = match.start()
            depth += 1
        elif match.group() == ")":
            depth -= 1
            closed_at = match.end()
            if depth == 0:
                yield text[start:closed_at], True
                start = closed_at
    if start < len(text):
        # ComfyUI reads an unbalanced "(a (b)" as one group as well.
        yield text[start:], text[start] == "(" and closed_at == len(text)
