"""The bridge without any process: what is signed, what is checked, and that nothing ends in silence."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from comfy_xdit.protocol.errors import WorkerDied
from comfy_xdit.protocol.messages import Cancelled, Load, Result
from comfy_xdit.protocol.rpc import Event, Host, Rank
from comfy_xdit.protocol.shared_memory import HEADER_BYTES, Segment
from comfy_xdit.protocol.spec import ModelSpec
from tests.rogue import Rogue

SECONDS = 20.0  # for a message to arrive, on a busy machine
WORLD = 2


@pytest.fixture
def host():
    host = Host(WORLD, os.getpid(), {})
    yield host
    host.close()


def fault_of(event: Event | None) -> str:
    assert event is not None, "nothing was said within the time"
    assert event.fault is not None, event
    return f"{type(event.fault).__name__}: {event.fault}"


SENSELESS = [
    {"tensors": 7},
    {"tensors": [None]},
    {"tensors": [{"dtype": "float32", "shape": [1 << 62] * 100_000, "offset": 64}]},
    {"job": "1"},
    {"body": {"Nonsense": {}}},
    {"body": {"Result": {"value": 1, "seconds": 2, "more": 3}}},
    {"body": {"Result": {"value": 1}}},
    {"body": {"Result": None}},
    {"body": {"tensor": 0}},
    {"body": {"tuple": 3}},
    {"body": {"dict": [[1]]}},
    {"body": {"dict": [[{"tuple": [[]]}, 1]]}},
    {"body": {"a": 1, "b": 2}},
]


@pytest.mark.parametrize("head", SENSELESS)
def test_whatever_ends_the_reader_is_said_at_once(host, head):
    Rogue(host).push("events", "events/0", 0, **head)
    assert "Unreadable: a message on events makes no sense" in fault_of(host.wait(SECONDS))


@pytest.mark.parametrize("head", SENSELESS)
def test_a_command_that_makes_no_sense_is_an_error_of_ours(host, head):
    rank = Rank(host.invitation(0))
    Rogue(host).push("commands/0", "commands/0", 0, **head)
    with pytest.raises(WorkerDied, match="a message on commands/0 makes no sense"):
        rank.receive("cpu")[1]()


@pytest.mark.parametrize(
    "body",
    [
        3,
        {"Stop": {}},
        {"Progress": {"step": "1", "steps": 2, "preview": None}},
        {"Progress": {"step": 1, "steps": 2, "preview": 3}},
        {"Result": {"value": 1, "seconds": None}},
        {"Failure": {"kind": "x", "message": ["y"], "traceback": "", "invalid": False}},
        {"Cancelled": {"step": True}},
        {"Ready": {"report": []}},
    ],
)
def test_a_rank_says_only_what_ranks_say(host, body):
    Rogue(host).push("events", "events/0", 0, body=body)
    assert "Unreadable: a message on events makes no sense" in fault_of(host.wait(SECONDS))


@pytest.mark.parametrize("text", [b"[]", b"{", b"\xff", b"[" * 100_000])
def test_what_is_signed_and_no_object_is_an_error_of_ours(host, text):
    rogue = Rogue(host)
    rogue.store.queue_push("events", rogue.signer.stamp(text) + text)
    assert "Unreadable: a message on events makes no sense" in fault_of(host.wait(SECONDS))


@pytest.mark.parametrize("junk", [b"", b"x", b"x" * 32 + b"{}", b"\x00" * 1000])
def test_a_message_without_a_signature_is_said_at_once_and_does_not_end_the_reader(host, junk):
    rogue = Rogue(host)
    rogue.store.queue_push("events", junk)
    assert "bad signature" in fault_of(host.wait(SECONDS))
    rogue.push("events", "events/1", 0)
    event = host.wait(SECONDS)
    assert event is not None and (event.rank, event.message) == (1, Cancelled(0))


def test_a_message_that_is_replayed_or_of_another_route_is_refused(host):
    rogue = Rogue(host)
    for _ in range(2):
        rogue.push("events", "events/0", 0)
    assert host.wait(SECONDS).fault is None
    assert "message 0 on events/0, expected 1" in fault_of(host.wait(SECONDS))


@pytest.mark.parametrize("route", ["events/2", "events/-1", "commands/0", "", None, 5])
def test_the_host_hears_its_ranks_only(host, route):
    Rogue(host).push("events", route, 0)
    assert "a message of the route" in fault_of(host.wait(SECONDS))


def test_a_rank_takes_no_message_for_another(host):
    rank = Rank(host.invitation(0))
    Rogue(host).push("commands/0", "commands/1", 0)
    with pytest.raises(WorkerDied, match="'commands/1' arrived on commands/0"):
        rank.receive("cpu")


def test_an_interrupt_that_the_host_did_not_write_does_nothing(host):
    rank, rogue = Rank(host.invitation(0)), Rogue(host)
    for flag in (b"1", b"", b"x" * 32):
        rogue.store.set("interrupt/1", flag)
        assert not rank.interrupted(1)
    host.interrupt(2)
    rogue.store.set("interrupt/1", rogue.store.get("interrupt/2"))
    assert not rank.interrupted(1), "the stamp of another job"
    host.interrupt(1)
    assert rank.interrupted(1)


def entry(**change: Any) -> dict[str, Any]:
    return {"dtype": "float32", "shape": [4], "offset": HEADER_BYTES} | change


@pytest.mark.parametrize(
    "bad",
    [
        entry(dtype="qint8"),
        entry(dtype="quint4x2"),
        entry(dtype="nonsense"),
        entry(dtype=None),
        entry(dtype=["float32"]),
        entry(shape=[-1]),
        entry(shape=[2, -1, -1]),
        entry(shape=[1 << 40]),
        entry(shape=[0, 1 << 62, 1 << 62]),
        entry(shape=[1.0]),
        entry(shape=[True]),
        entry(shape="4"),
        entry(shape=4),
        entry(offset=0),
        entry(offset=-64),
        entry(offset=HEADER_BYTES + 1),
        entry(offset=1 << 40),
        entry(offset=1 << 80),
        entry(offset=64.0),
        entry(offset=1 << 40, shape=[0]),
    ],
)
def test_every_field_of_a_tensor_is_checked_against_the_segment(bad):
    segment = Segment()
    try:
        segment.write([torch.ones(64)])
        (good,) = segment.read([entry()])
        assert torch.equal(good, torch.ones(4))
        with pytest.raises(ValueError, match="a message names"):
            segment.read([bad])
    finally:
        segment.close()


def test_a_segment_that_was_cut_off_is_an_error_not_a_crash():
    segment = Segment()
    try:
        entries = segment.write([torch.ones(1 << 16)])
        os.ftruncate(segment.descriptor, HEADER_BYTES)
        with pytest.raises(ValueError, match=f"the segment holds {HEADER_BYTES} bytes"):
            segment.read(entries)
    finally:
        segment.close()


def test_only_plain_numbers_cross():
    segment = Segment()
    try:
        with pytest.raises(TypeError, match="bits8 cannot cross the bridge"):
            segment.write([torch.empty(2, dtype=torch.bits8)])
        with pytest.raises(TypeError, match="cannot cross the bridge"):
            segment.write([torch.ones(2).to_sparse()])
    finally:
        segment.close()


def test_a_message_that_cannot_be_sent_leaves_no_gap(host):
    rank = Rank(host.invitation(0))
    with pytest.raises(ValueError, match="a message head of"):
        rank.send(1, Result("y" * 5_000_000, 0.0))
    with pytest.raises(TypeError, match="set cannot cross"):
        rank.send(1, Result({1}, 0.0))
    rank.send(1, Result("fine", 0.0))
    event = host.wait(SECONDS)
    assert event is not None and event.message == Result("fine", 0.0)


def test_a_preview_of_any_size_and_the_answer_behind_it_cross(host):
    rank = Rank(host.invitation(0))
    rank.progress(1, 1, 2, torch.arange(7, dtype=torch.uint8))
    rank.send(1, Result(torch.arange(5.0), 0.0))
    preview, answer = host.wait(SECONDS).message.preview, host.wait(SECONDS).message.value
    assert torch.equal(preview, torch.arange(7, dtype=torch.uint8)) and torch.equal(answer, torch.arange(5.0))


def test_the_keys_of_the_store_are_those_that_docs_security_lists(host):
    """Where ranks meet is not among them: torch.distributed signs nothing."""
    ranks = [Rank(host.invitation(rank)) for rank in range(WORLD)]
    for rank in ranks:
        rank.group_store().set("address", "127.0.0.1")
    host.send([0, 1], 1, Load(ModelSpec("", "transformer")))
    host.interrupt(1)
    rogue = Rogue(host)
    keys = {key.lstrip("/") for key in rogue.store.list_keys()} - {"init/"}
    assert not any("group" in key or "address" in key for key in keys), keys
    assert {key.partition("/")[0] for key in keys} <= {"commands", "events", "interrupt"}, keys
    assert ranks[1].group_store().get("address") == b"127.0.0.1"


def test_a_segment_that_somebody_still_refers_to_holds_nothing_once_it_is_closed():
    """An error in a call refers to the bridge, by its traceback; nodes, logs and histories keep errors."""

    def held() -> list[str]:
        links = (f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd"))
        return [link for link in links if os.path.exists(link) and "/memfd" in os.readlink(link)]

    before = held()
    segment = Segment()
    segment.write([torch.zeros(1 << 20)])
    assert len(held()) == len(before) + 2, "its own, and the map's"

    segment.close()

    assert held() == before
    assert (segment.beats, segment.heartbeat) == (0, 0.0), "asked by who has not heard of it yet"
