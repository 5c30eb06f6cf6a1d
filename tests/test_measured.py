"""Remembered times: written by several processes, read when damaged, keyed by what makes a time."""

import json
import logging
import subprocess
import sys
from dataclasses import replace

import pytest

from comfy_xdit.planning import cluster, measured
from comfy_xdit.planning.measured import Measured, remember
from comfy_xdit.planning.published import PUBLISHED
from comfy_xdit.planning.request import Request
from comfy_xdit.protocol import remembered
from comfy_xdit.protocol.parallel import ParallelConfig
from comfy_xdit.ranks.environment import ROOT

CPU = cluster.of_cpu(2, 1 << 34)
SD3 = Request.picture(PUBLISHED["sd3"])
ULYSSES = ParallelConfig(ulysses_degree=2)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A cache of its own for every test."""
    monkeypatch.setenv(remembered.FOLDER, str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_least_time_is_kept():
    assert Measured.load().seconds(ULYSSES, SD3, CPU) is None
    for seconds in (2.0, 3.0, 1.0, 1.5):
        remember(ULYSSES, SD3, CPU, seconds)
    assert Measured.load().seconds(ULYSSES, SD3, CPU) == 1.0


def test_other_tokens_rows_dtypes_models_and_machines_are_apart():
    remember(ULYSSES, SD3, CPU, 1.0)
    known = Measured.load()
    for other in (
        replace(SD3, image_tokens=1024), replace(SD3, batch=2), replace(SD3, dtype_bytes=4),
        replace(SD3, shape=PUBLISHED["sd3.5-large"]),
    ):  # fmt: skip
        assert known.seconds(ULYSSES, other, CPU) is None
    assert known.seconds(ParallelConfig(ring_degree=2), SD3, CPU) is None
    assert known.seconds(replace(ULYSSES, shard_weights=True), SD3, CPU) is None
    assert known.seconds(ULYSSES, SD3, cluster.parse("2 x L40")) is None
    # A prompt's length, and how many other devices there are, are not.
    assert known.seconds(ULYSSES, replace(SD3, text_tokens=77), CPU) == 1.0
    assert known.seconds(ULYSSES, SD3, cluster.of_cpu(8, 1 << 30)) == 1.0


def test_times_of_a_layout_by_tokens():
    for tokens in (1024, 4096):
        remember(ULYSSES, replace(SD3, image_tokens=tokens), CPU, tokens / 1024)
    remember(ULYSSES, replace(SD3, image_tokens=64, batch=2), CPU, 9.0)
    assert Measured.load().of_layout(ULYSSES, SD3, CPU) == {1024: 1.0, 4096: 4.0}


@pytest.mark.parametrize(
    "content",
    [
        b"{", b"[]", b"\xff\xfe", b'{"CPU": 3}', b'{"CPU": {"sd3": {"x": 1}}}',
        b'{"CPU": {"sd3": {"1 64 tokens": "fast"}}}', b'{"CPU": {"sd3": {"1 64 tokens": -1}}}',
    ],
)  # fmt: skip
def test_a_damaged_file_counts_as_empty_is_named_and_replaced(folder, content, caplog):
    folder.mkdir()
    (folder / measured.NAME).write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert Measured.load().seconds(ULYSSES, SD3, CPU) is None
        assert Measured.load().seconds(ULYSSES, SD3, CPU) is None
    assert [str(folder / measured.NAME) in r.getMessage() for r in caplog.records] == [True]  # said once
    remember(ULYSSES, SD3, CPU, 1.0)
    assert Measured.load().seconds(ULYSSES, SD3, CPU) == 1.0


def test_a_folder_that_cannot_be_written_costs_a_warning_and_nothing_else(folder, caplog):
    folder.write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        remember(ULYSSES, SD3, CPU, 1.0)
    assert "not kept up to date" in caplog.text
    assert Measured.load().seconds(ULYSSES, SD3, CPU) is None


WRITER = """
import sys
from dataclasses import replace
from comfy_xdit.planning import cluster
from comfy_xdit.planning.measured import remember
from comfy_xdit.protocol import remembered
from comfy_xdit.protocol.parallel import ParallelConfig
from comfy_xdit.planning.published import PUBLISHED
from comfy_xdit.planning.request import Request
start = int(sys.argv[1])
for tokens in range(start, start + 60):
    request = replace(Request.picture(PUBLISHED["sd3"]), image_tokens=tokens)
    remember(ParallelConfig(ulysses_degree=2), request, cluster.of_cpu(2, 1), 1.0)
"""


def test_two_processes_lose_nothing(folder):
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(start)], cwd=ROOT) for start in (1000, 2000)
    ]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0]
    (models,) = json.loads((folder / measured.NAME).read_text()).values()
    (entries,) = models.values()
    assert len(entries) == 120
    assert {path.name for path in folder.iterdir()} == {measured.NAME, "measured.lock"}  # no leftovers


def test_the_users_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv(remembered.FOLDER)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert remembered.cache_folder() == tmp_path / "comfy_xdit"
