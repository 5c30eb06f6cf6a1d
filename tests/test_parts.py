"""What a rank has of streams, and of what lies along them: every carrier of a plan."""

from __future__ import annotations

import pytest
import torch

from worker.parallel.parts import Parts, Shard
from worker.parallel.plan import Compressed, GroupedMask, PlanMismatch, Spans, Tokens


def test_a_table_of_another_length_is_an_error():
    parts = Parts(2, 0)
    parts.bring("image", 5)
    with pytest.raises(PlanMismatch, match="4 rows lies along 5 tokens"):
        parts.take(Tokens("image", 0), torch.zeros(4, 2))


@pytest.mark.parametrize("length", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_parts_of_all_ranks_are_the_whole(length: int, ranks: int):
    whole = torch.arange(length)[None]
    parts = []
    for rank in range(ranks):
        found = Parts(ranks, rank)
        found.bring("image", length)
        own = found.take(Tokens("image"), whole)
        assert own.shape[1] >= 1  # blocks cannot compute on nothing
        parts.append(found.true(own, "image", 1))
        assert torch.equal(found.held(parts[-1], "image", 1).shape == own.shape and own * 0, own * 0)
    assert torch.equal(torch.cat(parts, 1), whole)
    assert max(Shard(length, ranks).sizes) - min(Shard(length, ranks).sizes) <= 1


def test_spans_over_two_streams():
    spans = [(0, 3, "a"), (3, 7, "b"), (7, None, "c")]  # two text tokens, eight of the picture
    found = []
    for rank in range(2):
        parts = Parts(2, rank)
        parts.bring("text", 2)
        parts.bring("image", 8)
        found.append(parts.take(Spans("text image"), spans))
    assert found[0] == [(0, 1, "a"), (1, 2, "a"), (2, 5, "b")]
    assert found[1] == [(0, 1, "a"), (1, 2, "b"), (2, 5, "c")]


def of_ranks(carrier, value, length: int, ranks: int = 2) -> list:
    """What each rank takes of something on `length` tokens."""
    found = []
    for rank in range(ranks):
        parts = Parts(ranks, rank)
        parts.bring("image", length)
        found.append(parts.take(carrier, value))
    return found


def test_a_span_with_something_for_each_token():
    rows = torch.arange(10, 16)
    first, second = of_ranks(Spans("image"), [(0, 1, 5), (1, 7, rows), (7, 8, 6)], 8)
    assert [span[:2] for span in first + second] == [(0, 1), (1, 4), (0, 3), (3, 4)]
    assert torch.equal(torch.cat([first[1][2], second[0][2]]), rows)
    assert (first[0][2], second[1][2]) == (5, 6)


@pytest.mark.parametrize("every", [1, 2, 3, 6])
def test_what_is_kept_once_for_several_tokens(every: int):
    class Kept:
        __slots__ = ("data", "entries", "every")

    kept = Kept()
    kept.data = torch.randn(1, 6 // every, 2)
    kept.entries, kept.every = 6 // every, every
    carrier = Compressed("image", "data", "entries", "every")
    parts = of_ranks(carrier, kept, 6)
    assert [part.every for part in parts] == [1, 1]
    assert [part.entries for part in parts] == [part.data.shape[1] for part in parts]
    whole = torch.cat([part.data.expand(1, 3, 2) for part in parts], 1)
    assert torch.equal(whole, kept.data.repeat_interleave(every, 1))
    assert kept.every == every, "the model's own was changed"
    assert torch.equal(torch.cat(of_ranks(carrier, whole, 6), 1), whole)  # not kept so by every version
    kept.every = every + 1
    if every < 6:
        with pytest.raises(PlanMismatch, match="lie along 6 tokens"):
            of_ranks(carrier, kept, 6)


def test_a_mask_of_two_groups_is_that_of_all_pairs():
    class Groups:
        start, count = 3, 2
        before, group = torch.randn(1, 1, 1, 6), torch.randn(1, 1, 2, 6)

    carrier = GroupedMask("image", "start", "count", "before", "group")
    for mask in of_ranks(carrier, Groups, 6):
        assert torch.equal(mask[0, 0, :3], Groups.before[0, 0].expand(3, 6))
        assert torch.equal(mask[0, 0, 3:5], Groups.group[0, 0])
        assert not mask[0, 0, 5].any()
    assert of_ranks(carrier, mask, 6)[0] is mask


def test_of_a_stream_without_tokens_there_is_none_to_hold():
    none = torch.zeros(1, 0, 3)
    parts = Parts(2, 1)
    parts.bring("image", 0)
    held = parts.held(parts.true(parts.take(Tokens("image"), none), "image", 1), "image", 1)
    assert held.shape == none.shape and parts["image"].size == 0


@pytest.mark.parametrize("length", [5, 7])  # of a stream of seven tokens
def test_what_lies_along_the_last_tokens_goes_with_them(length):
    rows = torch.arange(length)[None, :, None]
    found = []
    for rank in range(3):
        parts = Parts(3, rank)
        parts.bring("sound", 7)
        own = parts.take(Tokens("sound", last=True), rows)
        start, stop = parts["sound"].held
        assert own.shape[1] == min(stop - start, max(0, stop - (7 - length)))
        found.append(own)
    assert torch.equal(torch.cat(found, 1), rows)
