"""How long models stay in the ranks: while someone holds them, a while longer, and while there is room."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch

from comfy_xdit.protocol.messages import Forget, Load, Status
from comfy_xdit.protocol.parallel import ParallelConfig
from comfy_xdit.protocol.spec import ModelSpec
from comfy_xdit.ranks import holders as life
from comfy_xdit.ranks.group import WorkerGroup
from comfy_xdit.ranks.registry import holders, running_groups, worker_group
from comfy_xdit.remote.model import RemoteModel
from tests import tiny
from tests.waiting import within
from worker.store import BUDGET, ModelStore

ONE, TWO = ParallelConfig(), ParallelConfig(ulysses_degree=2)


@pytest.fixture
def lingering(monkeypatch) -> Callable[[float], None]:
    return lambda seconds: monkeypatch.setattr(life, "LINGER_SECONDS", seconds)


def handle(model: tiny.TinyModel, parallel: ParallelConfig, dtype: str = "default") -> RemoteModel:
    remote = RemoteModel(ModelSpec.of(model.file, "transformer", dtype), parallel)
    remote.load()
    return remote


def denoise(remote: RemoteModel, model: tiny.TinyModel) -> torch.Tensor:
    x = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    given = tiny.conditions(model.family, model.config, 32)
    return remote.denoise(x, torch.ones(1), given)


def status(parallel: ParallelConfig) -> list[dict]:
    group = worker_group(parallel)
    return [group.call(Status(), ranks=(rank,)).value for rank in range(group.parallel.world_size)]


@pytest.fixture(scope="module")
def tiny_models(tmp_path_factory) -> dict[str, tiny.TinyModel]:
    """Files of its own: what other tests let go of less than a minute ago is still kept."""
    return tiny.write_models(tmp_path_factory.mktemp("life"))


@pytest.fixture(autouse=True, scope="module")
def _empty_ranks():
    """Nothing that other tests loaded counts."""
    for group in running_groups():
        group.close()


def test_a_model_nobody_holds_goes_and_so_do_its_tensors(tiny_models, lingering):
    lingering(0.0)
    remote = handle(tiny_models["sd3"], TWO)
    denoise(remote, tiny_models["sd3"])
    before = status(TWO)
    assert all(rank["bytes"] > 1e6 and rank["tensors"] > 0 for rank in before)

    del remote
    gc.collect()

    assert within(5, lambda: all(rank["bytes"] == rank["tensors"] == 0 for rank in status(TWO)))


def test_a_model_that_is_held_again_in_time_is_not_read_again(tiny_models, lingering):
    lingering(30.0)
    remote = handle(tiny_models["sd3"], TWO)
    loads = status(TWO)[0]["loads"]
    for _ in range(3):
        del remote
        gc.collect()
        remote = handle(tiny_models["sd3"], TWO)
    assert status(TWO)[0]["loads"] == loads
    denoise(remote, tiny_models["sd3"])


def test_one_of_two_handles_is_enough_to_stay(tiny_models, lingering):
    lingering(0.0)
    first, second = handle(tiny_models["sd3"], TWO), handle(tiny_models["sd3"], TWO)
    other = handle(tiny_models["flux"], TWO)
    size = status(TWO)[0]["bytes"]
    del first, other
    gc.collect()
    assert within(5, lambda: status(TWO)[0]["bytes"] < size)
    assert [m["name"] for m in status(TWO)[0]["models"]] == ["sd3.safetensors"]
    del second


def test_two_models_of_one_layout_stay_side_by_side(tiny_models):
    first, second = handle(tiny_models["sd3"], TWO), handle(tiny_models["flux"], TWO)
    loads = status(TWO)[0]["loads"]
    for _ in range(3):
        denoise(first, tiny_models["sd3"])
        denoise(second, tiny_models["flux"])
    assert status(TWO)[0]["loads"] == loads


def test_what_was_released_is_read_again_when_it_is_used(tiny_models):
    remote = handle(tiny_models["sd3"], TWO)
    expected = denoise(remote, tiny_models["sd3"])
    resident = [rank["resident"] for rank in status(TWO)]
    assert status(TWO)[0]["bytes"] > 0

    holders.release_all()

    assert [rank["bytes"] for rank in status(TWO)] == [0, 0]
    assert all(rank["resident"] <= before for rank, before in zip(status(TWO), resident, strict=True))
    assert torch.equal(denoise(remote, tiny_models["sd3"]), expected)


def test_groups_that_are_held_run_side_by_side_and_others_go(tiny_models):
    first, second = handle(tiny_models["sd3"], ONE), handle(tiny_models["sd3"], TWO)
    pids = [group.pids for group in (worker_group(ONE), worker_group(TWO))]
    denoise(first, tiny_models["sd3"])
    denoise(second, tiny_models["sd3"])
    assert [group.pids for group in (worker_group(ONE), worker_group(TWO))] == pids

    del first
    gc.collect()
    denoise(second, tiny_models["sd3"])

    assert [group.pids for group in running_groups()] == [pids[1]]


def test_a_group_that_does_not_run_is_not_started_to_be_told():
    group = WorkerGroup(ONE)
    assert group.tell(Forget()) is None
    assert group.pids == []


def test_a_call_counts_what_crossed_the_bridge(tiny_models):
    remote = handle(tiny_models["sd3"], TWO)
    latent = 4 * 16 * 8 * 8
    denoise(remote, tiny_models["sd3"])
    denoise(remote, tiny_models["sd3"])  # the prompt is known by now
    timing = worker_group(TWO).timings["Denoise"]
    assert latent < timing.sent < latent + 4096
    assert latent < timing.received < latent + 4096


def test_sixty_handles_leave_nothing_behind(tiny_models, lingering):
    lingering(0.0)
    kept = handle(tiny_models["flux"], TWO)
    tensors = status(TWO)[0]["tensors"]  # of handles that linger since the tests before
    resident = []
    for turn in range(60):
        remote = handle(tiny_models["sd3"], TWO)
        denoise(remote, tiny_models["sd3"])
        del remote
        gc.collect()
        if turn in (19, 59):
            assert within(5, lambda: status(TWO)[0]["tensors"] <= tensors)
            resident.append(max(rank["resident"] for rank in status(TWO)))
    # 40 models of 20 MB were read in between; what stays is less than one of them.
    assert resident[1] - resident[0] < 16e6, resident
    denoise(kept, tiny_models["flux"])


# ---------------------------------------------------------------------- room, without any process


class Sized:
    def __init__(self, spec: ModelSpec):
        self.nbytes, self.is_loaded = int(spec.path), False
        if self.nbytes < 0:
            raise ValueError("a bad file")

    def load(self) -> None:
        self.is_loaded = True


def spec(size: int, kind: str = "transformer") -> ModelSpec:
    return ModelSpec(str(size), kind)


@pytest.fixture
def store(monkeypatch) -> ModelStore:
    monkeypatch.setenv(BUDGET, "100")
    return ModelStore(torch.device("cpu"), 1, Sized)


def names(store: ModelStore) -> list[str]:
    return [model["name"] for model in store.report()["models"]]


def test_the_least_recently_used_makes_room(store):
    for size in (30, 40, 20):
        assert store.require(spec(size)).is_loaded
    store.require(spec(30))
    store.require(spec(50))
    assert names(store) == ["20", "30", "50"]
    assert store.report()["bytes"] == 100 and store.report()["room"] == 0


def test_a_model_above_the_budget_is_alone(store):
    store.require(spec(30))
    assert store.require(spec(130)).is_loaded
    assert names(store) == ["130"]


def test_a_bad_file_costs_nothing_that_is_loaded(store):
    store.require(spec(90))
    with pytest.raises(ValueError, match="bad file"):
        store.require(spec(-1))
    assert names(store) == ["90"]


def test_dropping_what_is_not_there_is_nothing(store):
    store.require(spec(10))
    store.drop([spec(11)])
    assert names(store) == ["10"]
    store.drop(None)
    assert names(store) == []


def test_a_load_of_another_dtype_is_another_model(tiny_models):
    group = worker_group(ONE)
    size = {}
    for dtype in ("fp32", "bf16"):
        group.call(Forget())
        group.call(Load(ModelSpec.of(tiny_models["sd3"].file, "transformer", dtype)))
        size[dtype] = group.call(Status()).value["bytes"]
    assert size["fp32"] == 2 * size["bf16"]
