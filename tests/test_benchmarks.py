"""What `make bench` compares with what, and how it ends where it cannot."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import editions, seam, speed
from benchmarks.__main__ import PARTS

ROOT = Path(__file__).parent.parent


def test_the_edition_before_comes_from_history_and_has_stages_by_hand(tmp_path):
    try:
        editions.write_edition(tmp_path)
    except editions.NoHistory as why:
        pytest.skip(str(why))
    assert "class FluxParts(StageParts)" in (tmp_path / "worker" / "models" / "flux.py").read_text()
    assert {way for _, way in editions.COMPARED} >= {"Ulysses 2", "Ring 2", "PipeFusion 2"}


def test_without_history_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(editions, "HERE", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setattr(sys, "argv", ["editions"])
    editions.main()
    assert f"its commit {editions.BEFORE} is not at hand" in capsys.readouterr().out
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(editions.NoHistory, match="clone the whole history"):
        editions.write_edition(tmp_path)


def test_bare_xfuser_runs_in_every_turn_and_one_rank_seldom():
    pair = ("Ulysses 2", f"{speed.XFUSER}Ulysses 2")
    together = ("one rank", *pair)
    assert together in speed.TOGETHER
    assert [speed._every(name, together) for name in together] == [speed.SELDOM, 1, 1]
    assert speed._every("CFG 2", ("one rank, guided", "CFG 2")) == speed.SELDOM
    times = {"one rank": {0: 6.0}, pair[0]: {0: 3.0, 1: 3.3}, pair[1]: {0: 3.0, 1: 3.0}}
    assert speed._speedup(times, pair[0], "one rank") == 2
    (line,) = speed.over_bare(4096, times)
    assert "bare xfuser 1.050, median of 2 turns; limit 1.03: OVER" in line


def test_the_seam_is_measured_on_models_with_blocks():
    for name in seam.NAMES:
        blocks, alone, _ = seam.cost(name, turns=1)
        assert blocks >= seam.BLOCKS and alone > 0


def test_a_part_that_is_none_is_refused():
    for part in PARTS:
        assert callable(importlib.import_module(f"benchmarks.{part}").main)
    command = [sys.executable, "-m", "benchmarks", "sped"]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert told.returncode == 2 and "sped is no part; choose among twin" in told.stderr
