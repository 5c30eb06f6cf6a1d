"""What every error of a person's making says: in the source, and of some that were bad once."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from comfy_xdit.planning import cluster, planner
from comfy_xdit.planning.published import PUBLISHED
from comfy_xdit.planning.request import Request
from comfy_xdit.protocol.errors import InvalidInput, OutOfDeviceMemory, RemoteError, counted
from comfy_xdit.protocol.parallel import ParallelConfig

ROOT = Path(__file__).parent.parent
PARTS = ("; ", ". ", ": ", ";\n")  # what is wrong, and behind one of these what to do


def texts() -> Iterator[tuple[str, str]]:
    """Place and text of every InvalidInput that is raised with one; values in it count as a word."""
    for folder in ("comfy_xdit", "worker"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if not isinstance(node, ast.Raise) or not isinstance(node.exc, ast.Call):
                    continue
                if ast.unparse(node.exc.func) == "InvalidInput" and isinstance(
                    node.exc.args[0], ast.JoinedStr | ast.Constant
                ):
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", _plain(node.exc.args[0])


def _plain(text: ast.JoinedStr | ast.Constant) -> str:
    if isinstance(text, ast.Constant):
        return str(text.value)
    return "".join(str(part.value) if isinstance(part, ast.Constant) else "VALUE" for part in text.values)


def test_every_text_says_what_is_wrong_and_then_what_to_do():
    found = dict(texts())
    assert len(found) > 100
    silent = {place: text for place, text in found.items() if not any(part in text[:-1] for part in PARTS)}
    silent = {place: text for place, text in silent.items() if text.strip("VALUE.: ")}  # made elsewhere
    assert silent == {}


@pytest.mark.parametrize(("number", "words"), [(0, "0 devices"), (1, "1 device"), (2, "2 devices")])
def test_numbers_agree_with_their_nouns(number, words):
    assert counted(number, "device") == words


def test_one_device_is_one_device():
    with pytest.raises(InvalidInput, match=r"= 2, but 1 device is selected \(cpu\); set"):
        ParallelConfig(ulysses_degree=2, devices=("cpu",)).check(("cpu",))
    with pytest.raises(
        InvalidInput, match=r"for 1 device: it needs at least two .* set shard_weights to false"
    ):
        planner.plan(Request.picture(PUBLISHED["flux"]), cluster.parse("1 x L40"), shard=True)


def test_a_rank_that_raised_says_what_to_do_and_keeps_its_traceback_for_the_log():
    error = RemoteError(1, "KeyError", "'weight'", "Traceback (most recent call last) ...")
    assert str(error).startswith("rank 1: KeyError: 'weight'\nPress Run again;")
    assert "Traceback" not in str(error) and error.traceback.startswith("Traceback")
    short = OutOfDeviceMemory.of(RemoteError(0, "OutOfMemoryError", "CUDA out of memory", "Traceback"))
    assert "What needs less: shard_weights" in str(short) and "report it" not in str(short)
