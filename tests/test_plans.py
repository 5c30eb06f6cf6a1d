"""Every plan of diffusers' classes: the model over ranks against itself on one."""

from __future__ import annotations

import pytest

from tests.plan_cases import CASES
from tests.plan_ranks import WORLD
from tests.rank_programs import found_by_ranks

# Exchanged or not, the sums are the same ones; a ring adds up its blocks in another order: a few 1e-7.
EXACT = 1e-6
DEAF = 1e-3  # what the attention of one's own tokens alone is off by, at least
LAYOUTS = ("ulysses 2", "ring 2", "ulysses 2 x ring 2", "ulysses 4")
SECONDS = 500


@pytest.fixture(scope="module")
def measured() -> dict[str, list[float]]:
    """[relative L2, deaf, collectives, bytes] by case and layout, from four processes."""
    return found_by_ranks("tests.plan_ranks", WORLD, SECONDS)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_a_model_over_ranks_is_that_on_one(measured, case: str, layout: str):
    error, deaf, *_ = measured[f"{case}, {layout}"]
    assert error <= EXACT
    assert deaf >= DEAF


def test_nothing_but_heads_is_sent(measured):
    """Ulysses: two exchanges per attention and one gather; PixArt has two blocks."""
    _, _, collectives, sent = measured["PixArt, ulysses 2"]
    tokens, width, four_bytes = 16, 64, 4
    exchanged = 2 * 4 * tokens // 2 * width // 2 * four_bytes  # query, key, value, output of each block
    gathered = tokens // 2 * width * four_bytes
    assert (collectives, sent) == (5, exchanged + gathered)
