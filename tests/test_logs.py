"""The ranks' logs: what is in them, who may read them, where errors say they are, and how many stay."""

from __future__ import annotations

import json
import logging
import os
import signal
import stat
import time
from pathlib import Path
from typing import Any

import pytest

from comfy_xdit.protocol.errors import InvalidInput, RemoteError, WorkerDied
from comfy_xdit.protocol.parallel import ParallelConfig
from comfy_xdit.ranks import logs, output
from comfy_xdit.ranks.group import WorkerGroup
from comfy_xdit.ranks.logs import RankLogs
from tests.faulty_rank import do
from worker import log

TWO = ParallelConfig(ulysses_degree=2)


@pytest.fixture(scope="module")
def pair():
    group = WorkerGroup(TWO, program="tests.faulty_rank")
    yield group
    group.close()


@pytest.fixture
def own_folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDIT_CACHE_DIR", str(tmp_path))
    return tmp_path / "logs"


@pytest.fixture
def own_handlers():
    root = logging.getLogger()
    before = list(root.handlers)
    yield root
    for handler in set(root.handlers) - set(before):
        root.removeHandler(handler)
        handler.close()


def folder_of(group: WorkerGroup) -> Path:
    return Path(group.logs.removeprefix("Logs of these ranks: "))


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def last(file: Path, message: str) -> dict[str, Any]:
    """The last line, which a rank writes when its answer is on its way."""
    deadline = time.monotonic() + 30.0
    while lines(file)[-1]["message"] != message:
        assert time.monotonic() < deadline, lines(file)[-1]
        time.sleep(0.02)
    return lines(file)[-1]


def mode(file: Path) -> int:
    return stat.S_IMODE(file.stat().st_mode)


# ---------------------------------------------------------------------- what ranks write


def test_each_rank_says_what_it_did_and_no_prompt(pair):
    pair.call(do("nothing", rank=7, words="a circle nobody else may see"))
    pair.call(do("nothing"))
    folder = folder_of(pair)
    assert mode(folder) == 0o700 and mode(folder.parent) == 0o700
    assert sorted(file.name for file in folder.iterdir()) == ["group.jsonl", "rank-0.jsonl", "rank-1.jsonl"]
    for rank in range(2):
        file = folder / f"rank-{rank}.jsonl"
        assert mode(file) == 0o600 and "circle" not in file.read_text()
        last(file, "done")
        first, *others = lines(file)
        assert (first["message"], first["pid"], first["level"]) == ("serves", pair.pids[rank], "INFO")
        done = [line for line in others if line["message"] == "done"]
        assert all(line["command"] == "Denoise" and line["seconds"] >= 0 for line in done)
        assert all(line["rank"] == rank and line["time"].startswith("20") for line in lines(file))
    assert mode(folder / "group.jsonl") == 0o600
    assert lines(folder / "group.jsonl")[0]["layout"] == "ulysses_degree 2 = 2"


def test_what_a_rank_raised_is_in_its_log_and_the_error_says_where(pair):
    with pytest.raises(RemoteError) as caught:
        pair.call(do("fail", kind="ValueError", text="broken", times=1))
    assert str(caught.value).endswith(f"\nLogs of these ranks: {folder_of(pair)}")
    told = last(folder_of(pair) / "rank-1.jsonl", "failed")
    assert (told["level"], told["error"]) == ("ERROR", "ValueError: broken")
    assert "in fail" in told["traceback"]


def test_what_the_person_can_mend_needs_no_log(pair):
    with pytest.raises(InvalidInput) as caught:
        pair.call(do("fail", kind="InvalidInput", text="too large", times=1))
    assert "Logs" not in str(caught.value)
    told = last(folder_of(pair) / "rank-0.jsonl", "refused")
    assert (told["level"], told["error"]) == ("WARNING", "too large")


def test_what_a_group_died_of_is_said_where_the_error_points_to(pair):
    pair.call(do("nothing"))
    folder = folder_of(pair)
    with pytest.raises(WorkerDied) as caught:
        pair.call(do("be ended", rank=1, number=int(signal.SIGKILL)))
    text = str(caught.value)
    assert text.endswith(f"\nLogs of these ranks: {folder}")
    told = last(folder / "group.jsonl", "ended")
    assert told["command"] == "Denoise" and "SIGKILL" in told["error"]
    pair.call(do("nothing"))
    assert folder_of(pair) != folder and folder.is_dir(), "the next group's are apart"


# ---------------------------------------------------------------------- size and number


def test_a_log_never_grows_beyond_its_limit(tmp_path, own_handlers, monkeypatch):
    monkeypatch.setattr(log, "LIMIT", 8 << 10)
    file = tmp_path / "rank-0.jsonl"
    log.begin(str(file), 0)
    for number in range(500):
        log.note("done", number=number)
        assert file.stat().st_size <= 8 << 10
    log.note("x", error="y" * 100_000)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["rank-0.jsonl", "rank-0.jsonl.1"]
    assert all(mode(one) == 0o600 for one in tmp_path.iterdir())
    assert len(lines(file)[-1]["error"]) == log.TEXT_CHARACTERS


def test_what_a_rank_prints_is_kept_to_its_end(monkeypatch):
    monkeypatch.setattr(output, "LIMIT", 64 << 10)
    monkeypatch.setattr(output, "KEPT", 8 << 10)
    monkeypatch.setattr(output, "LOOK_SECONDS", 0.05)
    group = WorkerGroup(ParallelConfig(), program="tests.faulty_rank")
    try:
        group.call(do("nothing"))
        own = group._processes._outputs[0]
        for _ in range(2):  # also of one that was shortened before
            group.call(do("say", text="x" * 99, times=10_000))
            deadline = time.monotonic() + 30.0
            while own.size > 8 << 10:
                assert time.monotonic() < deadline, own.size
                time.sleep(0.02)
            assert own.text().endswith("x" * 99)
        group.call(do("say", text="its last words", times=1))
        with pytest.raises(WorkerDied, match="its last words"):
            group.call(do("be ended", rank=0, number=int(signal.SIGKILL)))
    finally:
        group.close()


def test_what_is_asked_for_behind_the_end_of_an_output_is_all_that_is_left():
    own = output.Output()
    try:
        os.write(own.fileno(), b"one\n")
        assert own.text(begin=1000) == "one"
    finally:
        own.close()


def test_libraries_are_heard_from_warnings_on(tmp_path, own_handlers):
    log.begin(str(tmp_path / "rank.jsonl"), 3)
    logging.getLogger("some.library").info("noise")
    try:
        raise KeyError("weight")
    except KeyError:
        logging.getLogger("some.library").exception("odd %s", "value")
    (line,) = lines(tmp_path / "rank.jsonl")
    assert (line["logger"], line["message"], line["rank"]) == ("some.library", "odd value", 3)
    assert "KeyError: 'weight'" in line["traceback"]


def test_a_full_disk_ends_the_log_and_not_the_rank(own_handlers, capsys):
    log.begin("/dev/full", 0)
    log.note("done")
    log.note("done")
    assert capsys.readouterr().err.count("/dev/full is written no more: [Errno 28]") == 1
    assert not any(isinstance(handler, log._File) for handler in own_handlers.handlers)


def test_logs_of_some_groups_that_ended_stay_and_of_all_that_run(own_folder):
    running = RankLogs(1)
    ended = [RankLogs(1) for _ in range(logs.KEPT + 3)]
    for one in ended:
        one.close(error="")
    other = own_folder / f"20200101-000000-{os.getppid()}-1"
    dead = own_folder / f"20200101-000000-{1 << 22}-1"  # no process can have that number
    other.mkdir()
    dead.mkdir()
    last = RankLogs(1)
    kept = {folder.name for folder in own_folder.iterdir()}
    assert {running.folder.name, last.folder.name, other.name} <= kept and dead.name not in kept
    assert sum(one.folder.name in kept for one in ended) == logs.KEPT
    assert ended[-1].folder.name in kept and ended[0].folder.name not in kept
    for one in (running, last):
        one.close()


def test_without_a_place_to_write_there_are_none_and_a_warning(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDIT_CACHE_DIR", str(tmp_path / "file"))
    none = RankLogs(2)
    assert none.files == () and none.where == ""
    assert "the ranks write no logs" in caplog.text
    error = WorkerDied("gone")
    none.name_in(error)
    none.close()
    assert str(error) == "gone"
