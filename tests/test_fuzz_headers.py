"""Mutated safetensors headers through every reader: an answer or InvalidInput, soon, and nothing else.

So many as a normal run has time for, always the same; `make fuzz` for more.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from comfy_xdit.protocol.safetensors_header import read_header
from tests import fuzzed_headers
from tests.fuzzed_headers import changed, check_bytes, check_model, good, mutated
from tests.header_files import Header, write_raw


def examples(count: int) -> settings:
    """So many, without a limit for each but that of the test."""
    checks = list(HealthCheck)
    return settings(
        max_examples=count, database=None, deadline=None, derandomize=True, suppress_health_check=checks
    )


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "fuzz.safetensors"


@pytest.fixture(scope="module")
def readers(tiny_models: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return fuzzed_headers.readers(tiny_models, tmp_path_factory.mktemp("nets"))


@examples(2000)
@example(content=b'\x14\0\0\0\0\0\0\0{"__metadata__": []}')
@given(content=mutated())
def test_any_bytes(file: Path, content: bytes):
    check_bytes(file, content)


@examples(200)
@given(header=good)
def test_every_good_header_is_read(file: Path, header: Header):
    write_raw(
        file, json.dumps(header).encode(), max([e["data_offsets"][1] for e in header.values()], default=0)
    )
    assert {name: list(t.shape) for name, t in read_header(file).items()} == {
        name: e["shape"] for name, e in header.items()
    }


@pytest.mark.filterwarnings("ignore")  # of torch and diffusers, about sizes of nothing
@examples(100)
@given(data=st.data())
def test_headers_of_models(readers: dict[str, Any], file: Path, data: st.DataObject):
    read, shapes = readers[data.draw(st.sampled_from(sorted(readers)))]
    check_model(file, read, data.draw(changed(shapes)))
