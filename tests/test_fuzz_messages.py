"""Good, bad and foreign messages through both ends of the bridge; `make fuzz` sends a million."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzzed_messages import Bridge, answers, commands

TIMES = 20  # bad ones of each good one


@pytest.fixture(scope="module")
def bridge() -> Iterator[Bridge]:
    bridge = Bridge()
    yield bridge
    assert all(bridge.counts[kind] for kind in ("taken", "refused", "unsigned")), bridge.counts
    bridge.close()


some = settings(
    max_examples=60, database=None, deadline=None, derandomize=True,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


@some
@given(message=answers, seed=st.integers(0, 2**32))
def test_what_the_host_hears_is_itself_or_an_error_of_ours(bridge: Bridge, message: Any, seed: int):
    bridge.spoilt(message, to_rank=False, seed=seed, times=TIMES)


@some
@given(message=commands, seed=st.integers(0, 2**32))
def test_what_a_rank_hears_is_itself_or_an_error_of_ours(bridge: Bridge, message: Any, seed: int):
    bridge.spoilt(message, to_rank=True, seed=seed, times=TIMES)
