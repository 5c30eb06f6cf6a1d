"""Two programs of one user on one machine: the second is told which other has the GPU. No GPU is needed."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from comfy_xdit.protocol.errors import DeviceInUse
from comfy_xdit.protocol.parallel import ParallelConfig
from comfy_xdit.ranks import claims
from comfy_xdit.ranks.claims import Claim
from comfy_xdit.ranks.group import WorkerGroup
from tests.faulty_rank import do

ROOT = Path(__file__).parent.parent
ON_GPU = ParallelConfig(devices=("cuda:0",))
CLAIMS = "from comfy_xdit.ranks.claims import Claim; held = Claim(('cuda:0',))"
RUNS = """
from comfy_xdit.protocol.parallel import ParallelConfig
from comfy_xdit.ranks.group import WorkerGroup
from tests.faulty_rank import do
group = WorkerGroup(ParallelConfig(devices=("cuda:0",)), program="tests.faulty_rank")
group.call(do("nothing"))
"""
# A child that outlives its parent, as a custom node's may.
FORKS = (
    CLAIMS
    + """
import os
if os.fork() == 0:
    os.close(1)
    os.read(0, 1)  # until the test is over
else:
    os.write(1, b"ready\\n")
os._exit(0)"""
)


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDIT_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv(claims.SHARE, raising=False)


@contextlib.contextmanager
def program(words: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """Another program that has done `words`, and waits."""
    process = subprocess.Popen(
        [sys.executable, "-c", f"{words}\nprint('ready', flush=True)\ninput()"],
        cwd=ROOT,
        env=os.environ | environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout.readline() == b"ready\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def is_free(device: str) -> bool:
    try:
        Claim((device,)).release()
    except DeviceInUse:
        return False
    return True


def test_the_second_program_is_told_who_has_the_device_and_what_to_do():
    with program(CLAIMS) as other:
        with pytest.raises(DeviceInUse) as caught:
            Claim(("cuda:1", "cuda:0"))
        text = str(caught.value)
        assert text.startswith("cuda:0 is in use by the ranks of another program") and "since 20" in text
        assert f"pid {other.pid} ({sys.executable} -c from comfy_xdit.ranks.claims" in text
        assert "End that program" in text and "XDIT_SHARE_DEVICES=1" in text
        assert is_free_elsewhere("cuda:1"), "the claim that failed has let go of the device it had"
        other.kill()
        other.wait()
        assert is_free("cuda:0"), "the kernel ends a claim with its process"


def test_a_device_is_the_same_under_any_number():
    with program(CLAIMS, CUDA_VISIBLE_DEVICES="1"):
        assert is_free("cuda:0") and not is_free("cuda:1")


def test_a_child_of_the_program_does_not_keep_the_device(tmp_path):
    with program(FORKS) as other:
        other.wait()
        assert is_free("cuda:0")


def test_who_asks_for_it_shares(monkeypatch):
    monkeypatch.setenv(claims.SHARE, "1")
    with program(CLAIMS):
        assert is_free("cuda:0")
    monkeypatch.delenv(claims.SHARE)
    with program(CLAIMS, XDIT_SHARE_DEVICES="1"):
        assert is_free("cuda:0")


def test_within_a_program_claims_are_counted():
    first, second = Claim(("cuda:0",)), Claim(("cuda:0",))
    first.release()
    assert not is_free_elsewhere("cuda:0")
    second.release()
    assert is_free_elsewhere("cuda:0")


def test_cpu_ranks_claim_nothing(tmp_path):
    with program(CLAIMS.replace("'cuda:0',", "'cpu', 'cpu'")):
        Claim(("cpu", "cpu"))
        assert claims.exclusive(("cpu", "cpu")) == {} and list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_said_and_stops_nobody(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDIT_CACHE_DIR", str(tmp_path / "file"))
    Claim(("cuda:0",)).release()
    assert "other programs cannot be told that cuda:0 is in use" in caplog.text


def test_ranks_of_two_programs_are_never_on_one_device():
    group = WorkerGroup(ON_GPU, program="tests.faulty_rank")
    try:
        with program(RUNS) as other:
            with pytest.raises(DeviceInUse, match=f"pid {other.pid} "):
                group.call(do("nothing"))
            assert group.pids == []
        group.call(do("nothing"))
        assert group.pids and not is_free_elsewhere("cuda:0")
    finally:
        group.close()
    assert is_free_elsewhere("cuda:0")


def is_free_elsewhere(device: str) -> bool:
    """Asked in another process: this one's own claims do not stop it."""
    words = f"from comfy_xdit.ranks.claims import Claim\nClaim(({device!r},))"
    asked = subprocess.run([sys.executable, "-c", words], cwd=ROOT, capture_output=True, text=True)
    assert asked.returncode == 0 or f"pid {os.getpid()} (" in asked.stderr, asked.stderr
    return asked.returncode == 0
