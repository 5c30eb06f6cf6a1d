"""Exchanges through main memory, with which tests have several ranks on one GPU: the same words arrive."""

from __future__ import annotations

import torch

from tests.rank_programs import found_by_ranks
from worker.parallel.staged import STAGED, backend_of


def test_what_ranks_exchange_arrives():
    found = found_by_ranks("tests.staged_rank", 2, 120.0)
    assert found == {
        "backend": "staged",
        "exchange": [0.0, 10.0],
        "before": [0.0, 0.0, 0.0],
        "pass_on": [10.0, 11.0, 12.0],
        "neighbours": [None, [10.0, 11.0, 12.0]],
        "sum": [10.0, 12.0, 14.0],
        "gather": [[[0.0, 0.0], [0.0, 0.0]], [[1.0, 1.0]]],
        "all_gather": [[[0.0, 2.0], [1.0, 3.0]], [[1.0, 3.0], [2.0, 4.0]]],
        "row": [1, 1, 2, 2],
        "pipeline": [0.0, 2.0, 4.0, 6.0],
    }


def test_only_tests_ask_for_it(monkeypatch):
    monkeypatch.delenv(STAGED, raising=False)
    assert [backend_of(torch.device(name)) for name in ("cpu", "cuda")] == ["gloo", "nccl"]
