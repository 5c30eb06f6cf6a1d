"""What `make bench-gpu` does, on CPU with small models; docs/gpu.md says no more than was done."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.measure import Row, measured
from benchmarks.gpu.page import NOT_YET, page
from benchmarks.gpu.shapes import SHAPES

DOCS = Path(__file__).parent.parent / "docs" / "gpu.md"
PASSED = "device: NVIDIA H200, torch 2.11\ntests/gpu/test_vae.py .\n=== 90 passed, 3 skipped in 301.20s ==="


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_every_model_is_measured_small_on_cpu(shape):
    row = measured(shape, torch.device("cpu"), turns=1, small=True)
    assert row.plain > 0 and row.seam > 0
    if shape.family is None:
        assert row.rank is None
    else:
        assert row.difference <= 1e-5 and row.bytes > 1e5 and row.load > 0
        assert 0 < row.bridge < row.rank and row.peak is None


def test_the_page_says_what_was_run_and_what_was_not():
    rows = [
        asdict(Row("FLUX", "some tokens", 0.25, 0.998)),
        asdict(Row("SD3", "", 1, 1, 1, 0.98, 0.002, 9, 1 << 30)),
    ]
    results = {"device": "NVIDIA H200", "torch": "2.11", "turns": 12, "rows": rows}
    assert page(None, None).count(NOT_YET) == 2
    text = page(results, None)
    assert text.count(NOT_YET) == 1 and "On NVIDIA H200, 12 turns, torch 2.11." in text
    assert "| FLUX | some tokens | 0.2500 | 0.998 |  |" in text
    assert "| SD3 |  | 1.0000 | 1.000 | 1.0000 | 0.980 | 2.00 | 9.0 | 1.0 |  |  |" in text
    text = page(results, PASSED)
    assert NOT_YET not in text and "On NVIDIA H200, torch 2.11: 90 passed, 3 skipped in 301.20s" in text
    failed = page(
        None,
        f"FAILED tests/gpu/test_vae.py::test_tiles\n{PASSED.replace('90 passed', '1 failed, 89 passed')}",
    )
    assert "1 failed, 89 passed" in failed and "* `FAILED tests/gpu/test_vae.py::test_tiles`" in failed
    assert "Ended before pytest could say" in page(None, "collecting ...")


def test_the_page_in_the_docs_is_the_template_where_nothing_was_run():
    text = DOCS.read_text()
    assert text.count(NOT_YET) < 2 or text == page(None, None)
