"""How the tokens of a prompt are laid into the rows that an encoder reads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

LONGEST_WHOLE_GROUP = 8  # a longer run of tokens may be cut at the end of a row
Token = tuple[int, float]
Part = tuple[str, float]


@dataclass(frozen=True)
class Layout:
    """What stands in a row beside the prompt's own tokens.

    Args:
        head, tail: special tokens before and behind the prompt's.
        pad: what a row is filled up with.
        least: tokens of a row.
        most: tokens of a row at most, 0 is no limit.
        further: what is more than `most` goes on in further rows; otherwise it is left out.
    """

    head: tuple[int, ...]
    tail: tuple[int, ...]
    pad: int
    least: int
    most: int = 0
    further: bool = False


@dataclass(frozen=True)
class Rows:
    """Rows of (token, weight) of one length, how much of each is no padding, and tokens left out."""

    rows: list[list[Token]]
    filled: list[int]
    left_out: list[int]


def lay(groups: Sequence[Sequence[Token]], layout: Layout, least: int = 0) -> Rows:
    """Lay groups of tokens, one of each part of the prompt, into rows of at least `least` tokens."""
    room = layout.most - len(layout.head) - len(layout.tail) if layout.most else None
    if layout.further and room is not None:
        bodies, left_out = _rows(groups, room), []
    else:
        body = [token for group in groups for token in group]
        bodies, left_out = [body[:room]], [] if room is None else [token for token, _ in body[room:]]
    head, tail = _unweighted(layout.head), _unweighted(layout.tail)
    rows = [[*head, *body, *tail] for body in bodies]
    length = max(layout.least, least)
    padded = [row + _unweighted([layout.pad] * (length - len(row))) for row in rows]
    return Rows(padded, [len(row) for row in rows], left_out)


def _rows(groups: Sequence[Sequence[Token]], room: int) -> list[list[Token]]:
    """As many rows of `room` tokens as are needed.

    A group shorter than LONGEST_WHOLE_GROUP is not cut: it moves to the next row.
    """
    bodies: list[list[Token]] = [[]]
    for group in groups:
        rest = list(group)
        while rest:
            free = room - len(bodies[-1])
            if len(rest) > free and len(group) < LONGEST_WHOLE_GROUP and bodies[-1]:
                free = 0
            bodies[-1] += rest[:free]
            rest = rest[free:]
            if rest:
                bodies.append([])
    return bodies


def _unweighted(tokens: Iterable[int]) -> list[Token]:
    return [(token, 1.0) for token in tokens]


def joined(parts: Iterable[Part]) -> list[Part]:
    """Neighbours of one weight as one text, so that their tokens are those of the whole.

    The space between two parts goes to the second: a token of a word includes the space before it.
    """
    result: list[Part] = []
    for text, weight in parts:
        if result and result[-1][1] == weight:
            result[-1] = (result[-1][0] + text, weight)
        else:
            result.append((text, weight))
    for place in range(len(result) - 1):
        (text, weight), (after, other) = result[place : place + 2]
        words = text.rstrip()
        result[place], result[place + 1] = (words, weight), (text[len(words) :] + after, other)
    return result
