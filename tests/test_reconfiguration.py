"""Another layout on the same graph: the same picture, and nothing left of the layout before."""

from __future__ import annotations

import gc
import threading

import psutil

from comfy_xdit.protocol.parallel import ParallelConfig
from comfy_xdit.ranks.registry import worker_group
from comfy_xdit.remote.model import RemoteModel
from tests import pipefusion_runs as runs

ROUNDS = 2
LAYOUTS = {
    "Ulysses 2": ParallelConfig(ulysses_degree=2),
    "Ring 2": ParallelConfig(ring_degree=2),
    "PipeFusion 2": ParallelConfig(pipefusion_degree=2, warmup_steps=runs.ALL),
    "CFG 2": ParallelConfig(cfg_parallel_degree=2),
    "Ulysses 2, sharded": ParallelConfig(ulysses_degree=2, shard_weights=True),
    "one rank": ParallelConfig(),
}


def test_one_layout_after_the_other(tmp_path):
    model = runs.write_models(tmp_path)["flux"]
    asked = runs.request(model)
    wanted = runs.plain(model, asked)
    before, left = [], []
    for _ in range(ROUNDS):
        for name, layout in LAYOUTS.items():
            remote = RemoteModel(asked.spec, layout)  # the handle of the layout before is gone with this
            actual = remote.sample(asked)
            assert runs.tiny.relative_l2(actual - asked.noise, wanted - asked.noise) <= runs.EXACT, name
            assert not [pid for pid in before if psutil.pid_exists(pid)], f"{name} left processes behind"
            before = list(worker_group(layout).pids)
            assert len(before) == layout.world_size
        gc.collect()
        host = psutil.Process()
        left.append((host.num_fds(), threading.active_count(), host.memory_info().rss))
    descriptors, threads, memory = zip(*left, strict=True)
    assert len(set(descriptors)) == 1, descriptors
    assert len(set(threads)) == 1, threads
    assert max(memory[1:]) - memory[0] < 16 << 20, [size >> 20 for size in memory]
