"""Messages, good ones and all kinds of bad ones, through both ends of a real bridge.

A few come from hypothesis; many are made of each by a seed: to send one takes less than to draw one.
"""

from __future__ import annotations

import json
import math
import os
import queue
import random
import time
from collections import Counter
from typing import Any

import torch
from hypothesis import strategies as st

from comfy_xdit.protocol.errors import WorkerDied
from comfy_xdit.protocol.messages import (
    Cancelled,
    Decode,
    Denoise,
    Failure,
    Forget,
    Keep,
    Known,
    Load,
    Patch,
    PatchSet,
    Progress,
    Ready,
    Result,
    Sample,
)
from comfy_xdit.protocol.plain import flatten
from comfy_xdit.protocol.rpc import EVENTS, Host, Rank
from comfy_xdit.protocol.shared_memory import Segment
from comfy_xdit.protocol.signed import MAC_BYTES, Signer, Unsigned
from comfy_xdit.protocol.spec import ModelSpec
from tests.rogue import Rogue

WORLD = 2
SECONDS = 5.0  # of a processor, the most that one may take
DEEP = 3000  # nested so deep
DTYPES = ("float32", "bfloat16", "int64", "uint8", "bool", "float8_e4m3fn", "qint8", "quint4x2", "complex64")

# ---------------------------------------------------------------------- good ones

numbers = st.integers(-3, 40) | st.integers(-(2**70), 2**70) | st.booleans() | st.floats(allow_nan=False)
tensors = st.builds(
    lambda shape, dtype: torch.arange(math.prod(shape)).reshape(shape).to(dtype),
    st.lists(st.integers(0, 5), max_size=4),
    st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool]),
)
keys = st.text(max_size=8) | st.integers(-3, 3) | st.sampled_from(["context", "y", "transformer_options"])
plain = st.recursive(
    st.none() | numbers | st.text(max_size=8) | tensors | st.builds(Known, st.integers(0, 9)),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(keys, inner, max_size=4)
        | st.builds(Keep, keys, tensors)
    ),
    max_leaves=12,
)
words = st.dictionaries(st.text(max_size=6), plain, max_size=4)
seconds = st.floats(0, 1e6)
specs = st.builds(ModelSpec, st.text(max_size=20), st.sampled_from(["transformer", "vae"]))
answers = (
    st.builds(Ready, words)
    | st.builds(Progress, st.integers(0, 99), st.integers(0, 99), st.none() | tensors)
    | st.builds(Result, plain, seconds, st.none() | seconds, seconds)
    | st.builds(Failure, *[st.text(max_size=30)] * 3, st.booleans())
    | st.builds(Cancelled, st.integers(0, 99))
)
patches = st.builds(
    PatchSet,
    st.text(max_size=5),
    st.none() | st.dictionaries(keys, st.lists(st.builds(Patch, st.just("lora"), words, seconds)).map(tuple)),
)
commands = (
    st.builds(Load, specs)
    | st.builds(Denoise, specs, tensors, tensors, words, patches=patches)
    | st.builds(Sample, specs, st.just("euler"), *[tensors] * 3, seconds, words, st.none() | words, tensors)
    | st.builds(Decode, specs, tensors)
    | st.builds(Forget, st.none() | st.lists(specs).map(tuple), st.lists(keys).map(tuple))
)

# ---------------------------------------------------------------------- bad ones


class Spoiler:
    """Makes bad messages of good ones: always the same of one seed."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)

    def anything(self) -> Any:
        """A value that JSON holds."""
        one = self.random
        return one.choice((
            None, True, -1, 0, 1, 2**62, 2**80, 1.5, float("nan"), float("inf"), "", "x", "tensor", [], {},
            [[]], [None, 1], {"tensor": one.choice((0, 1, -1, 10**9, True, "0", None, []))}, {"tuple": {}},
            {"dict": [[1]]}, {"dict": [[{"dict": []}, 1]]}, {"dict": [[{"tuple": [[]]}, 1]]},
            {"a": 1, "b": 2},
            {"Known": {"name": 1}}, {"Known": {}}, {"Known": []}, {"WORDS": {}}, {"Result": {"value": 1}},
            {"Progress": {"step": "1", "steps": None}}, {"Stop": {}}, {"Load": {"spec": 3}},
            [1] * one.randrange(2000), "y" * one.randrange(5000),
        ))  # fmt: skip

    def changed(self, value: Any) -> Any:
        """JSON with something in it that is other than it was; `value` is changed, too."""
        owner, key = None, None
        inner = value
        while isinstance(inner, (dict, list)) and inner and (owner is None or self.random.random() < 0.8):
            owner = inner
            key = self.random.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
            inner = owner[key]
        if owner is None:
            return self.anything()
        how = self.random.randrange(5)
        if how == 0:
            del owner[key]
        elif how == 1 and isinstance(owner, dict):
            owner[str(self.anything())[:50]] = owner.pop(key)
        elif how == 2 and isinstance(owner, list):
            owner += [owner[key]] * self.random.randrange(1, 5)
        elif how == 3:
            owner[key] = [owner[key]]
        else:
            owner[key] = self.anything()
        return value

    def entry(self) -> dict[str, Any]:
        """Where a tensor is said to be."""
        one = self.random
        sizes = (0, 1, 2, 3, 64, 4096, 2**31, 2**62, 2**70, -1, 1.0, True, None)
        return {
            "dtype": one.choice(DTYPES),
            "shape": [one.choice(sizes) for _ in range(one.choice((0, 1, 2, 3, 70, 3000)))],
            "offset": one.choice((0, 64, 128, 65, -64, 4096, 1 << 40, 1 << 80, 64.0, None)),
        }

    def bytes(self, content: bytes) -> bytes:
        """Some of them other than they were."""
        spoilt = bytearray(content)
        for _ in range(self.random.randrange(1, 4)):
            at = self.random.randrange(len(spoilt) + 1)
            stop = min(len(spoilt), at + self.random.choice((0, 1, 1, 8, 1000)))
            spoilt[at:stop] = self.random.randbytes(self.random.randrange(9))
        return bytes(spoilt) or b"x"


# ---------------------------------------------------------------------- through the bridge


class Bridge:
    """A host and the end of a rank in this process; what arrives is judged at once.

    Raises of `send`:
        AssertionError: something else came of a message than itself or an error of ours.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._host = Host(WORLD, os.getpid(), {})
        self._rank = Rank(self._host.invitation(0))
        self._rogue = Rogue(self._host)
        # Its own thread ends as it does at a close; from then on the same loop runs here, for each message.
        self._events = self._host._store.clone()
        self._host._closing = True
        self._rogue.store.queue_push(EVENTS, b"")
        self._host._reader.join()
        self._host.inbox.get_nowait()

    def close(self) -> None:
        """Let go of it."""
        self._rogue.store.queue_push(EVENTS, b"")
        self._host.close()

    def spoilt(self, message: Any, to_rank: bool, seed: int, times: int) -> None:
        """`message` as it is, and so many bad ones made of it, to the host or to the rank."""
        segment, route = self._place(to_rank)
        flat = flatten(message)
        good = {"job": 7, "body": flat.head, "tensors": segment.write(flat.tensors)}
        self._send(to_rank, self._seal(route, good), flat)
        spoiler = Spoiler(seed)
        for _ in range(times):
            sealed, told = self._bad(spoiler, route, json.loads(json.dumps(good)))
            self._send(to_rank, sealed, told)

    def _place(self, to_rank: bool) -> tuple[Segment, str]:
        return (self._host._outbound, "commands/0") if to_rank else (self._host._inbound[0], f"{EVENTS}/0")

    def _number(self, route: str) -> int:
        seen = self._rank._seen if route.startswith("commands") else self._host._seen
        return seen.next(route)

    def _seal(self, route: str, head: dict[str, Any]) -> bytes:
        return self._rogue.signer.seal(route, self._number(route), head)

    def _bad(self, spoiler: Spoiler, route: str, head: dict[str, Any]) -> tuple[bytes, Any]:
        """A message, and what is expected: "unsigned", or anything that is an answer."""
        one, signer = spoiler.random, self._rogue.signer
        how = one.randrange(12)
        if how < 3:
            good = self._seal(route, head)
            sealed = self._of_others(spoiler, good)
            return sealed, None if sealed == good else "unsigned"
        if how == 3:
            other = one.choice((f"{EVENTS}/1", f"{EVENTS}/2", "commands/0", "commands/1", "", "x" * 1000))
            return signer.seal(other, self._number(other) if other == f"{EVENTS}/1" else 0, head), None
        if how == 4:
            return signer.seal(route, self._number(route) + one.choice((-1, 1, 1000, -(2**70))), head), None
        if how == 5:
            body = spoiler.bytes(json.dumps(head).encode())
            return signer.stamp(body) + body, None
        if how == 6:
            begin, end = one.choice(
                (("[", "]"), ('{"tuple":[', "]}"), ('{"a":', "}"), ('{"dict":[[1,', "]]}"))
            )
            deep = one.choice((50, 400, DEEP))
            text = json.dumps({"route": route, "sequence": self._number(route), "job": 1, "tensors": []})
            body = f'{text[:-1]}, "body": {begin * deep}1{end * deep}}}'.encode()
            return signer.stamp(body) + body, None
        if how == 7:
            head["tensors"] = [spoiler.entry() for _ in range(one.randrange(1, 4))]
            return self._seal(route, head), None
        whole = {"route": route, "sequence": self._number(route), **head}
        part = one.choice(("body", "body", "body", "tensors", "whole"))
        if part == "whole":
            whole = spoiler.changed(whole)
        else:
            whole[part] = spoiler.changed(whole[part])
        text = json.dumps(whole).encode()
        return signer.stamp(text) + text, None

    @staticmethod
    def _of_others(spoiler: Spoiler, good: bytes) -> bytes:
        """A message of somebody who has no secret, made of a good one."""
        one = spoiler.random
        return one.choice((
            lambda: spoiler.bytes(good),
            lambda: one.randbytes(one.randrange(1, 200)),
            lambda: good[: one.randrange(1, len(good))],
            lambda: Signer("of another group").stamp(good[MAC_BYTES:]) + good[MAC_BYTES:],
        ))()  # fmt: skip

    def _send(self, to_rank: bool, sealed: bytes, expected: Any) -> None:
        began = time.process_time()
        came = self._to_rank(sealed) if to_rank else self._to_host(sealed)
        taken = time.process_time() - began
        assert taken < SECONDS, f"{taken:.1f} s for {sealed[:2000]!r}"
        if isinstance(came, BaseException):
            kind = "unsigned" if isinstance(came, Unsigned) else "refused"
            assert isinstance(came, WorkerDied), f"{came!r} of {sealed[:2000]!r}"
            assert 0 < len(str(came)) < 3000, len(str(came))
        else:
            kind = "taken"
        if expected == "unsigned":
            assert kind == "unsigned", f"{kind}: {came!r} of {sealed[:2000]!r}"
        elif expected is not None:
            assert kind == "taken", f"{came!r} of the good {sealed[:2000]!r}"
            again = flatten(came)
            assert again.head == expected.head
            assert all(torch.equal(a, b) for a, b in zip(again.tensors, expected.tensors, strict=True))
        self.counts[kind] += 1

    def _to_rank(self, sealed: bytes) -> Any:
        self._rogue.store.queue_push("commands/0", sealed)
        try:
            return self._rank.receive("cpu")[1]()
        except WorkerDied as error:
            return error

    def _to_host(self, sealed: bytes) -> Any:
        """By the loop of the thread that reads: it ends by a fault, or by the empty message behind."""
        self._rogue.store.queue_push(EVENTS, sealed)
        self._rogue.store.queue_push(EVENTS, b"")
        self._host._read(self._events)
        event = self._host.inbox.get_nowait()
        if event.fault is not None and not isinstance(event.fault, Unsigned):
            self._rogue.store.queue_pop(EVENTS)
        else:
            assert isinstance(self._host.inbox.get_nowait().fault, EOFError)
        try:
            extra = self._host.inbox.get_nowait()
        except queue.Empty:
            return event.message if event.fault is None else event.fault
        raise AssertionError(f"one more of {sealed[:2000]!r}: {extra}")
