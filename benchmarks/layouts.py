"""The layouts whose parity is measured, by the names that tables and tests call them."""

from __future__ import annotations

from comfy_xdit.protocol.parallel import ParallelConfig

# Two to four ranks, held by tests/test_parity.py.
LAYOUTS = {
    "1 rank": ParallelConfig(),
    "Ulysses 2": ParallelConfig(ulysses_degree=2),
    "Ring 2": ParallelConfig(ring_degree=2),
    "Ulysses 2 x Ring 2": ParallelConfig(ulysses_degree=2, ring_degree=2),
    "CFG 2": ParallelConfig(cfg_parallel_degree=2),
    "data 2": ParallelConfig(data_parallel_degree=2),
    "data 2 x CFG 2": ParallelConfig(data_parallel_degree=2, cfg_parallel_degree=2),
    "CFG 2 x Ulysses 2": ParallelConfig(cfg_parallel_degree=2, ulysses_degree=2),
}
# Every step a warm-up step, so that it is exact; held by tests/test_pipefusion*.py.
ALL = 1000
PIPELINES = {
    "PipeFusion 2": ParallelConfig(pipefusion_degree=2, warmup_steps=ALL),
    "PipeFusion 3": ParallelConfig(pipefusion_degree=3, warmup_steps=ALL),
    "PipeFusion 2 x CFG 2": ParallelConfig(pipefusion_degree=2, cfg_parallel_degree=2, warmup_steps=ALL),
    "PipeFusion 2 x data 2": ParallelConfig(pipefusion_degree=2, data_parallel_degree=2, warmup_steps=ALL),
    "PipeFusion 2 x Ulysses 2": ParallelConfig(pipefusion_degree=2, ulysses_degree=2, warmup_steps=ALL),
    "PipeFusion 2 x Ring 2": ParallelConfig(pipefusion_degree=2, ring_degree=2, warmup_steps=ALL),
}
# Held by tests/test_sharding.py.
SHARDED = {
    "Ulysses 2, sharded": ParallelConfig(ulysses_degree=2, shard_weights=True),
    "Ring 2, sharded": ParallelConfig(ring_degree=2, shard_weights=True),
    "CFG 2, sharded": ParallelConfig(cfg_parallel_degree=2, shard_weights=True),
    "data 2, sharded": ParallelConfig(data_parallel_degree=2, shard_weights=True),
    "CFG 2 x Ulysses 2, sharded": ParallelConfig(cfg_parallel_degree=2, ulysses_degree=2, shard_weights=True),
    "PipeFusion 2 x Ulysses 2, sharded": ParallelConfig(
        pipefusion_degree=2, ulysses_degree=2, shard_weights=True, warmup_steps=ALL
    ),
}
# Four and eight ranks of every method and of hybrids of all of them, on models wide and deep enough for them.
WIDE = {
    "Ulysses 4": ParallelConfig(ulysses_degree=4),
    "Ring 4": ParallelConfig(ring_degree=4),
    "data 4": ParallelConfig(data_parallel_degree=4),
    "CFG 2 x Ring 2": ParallelConfig(cfg_parallel_degree=2, ring_degree=2),
    "data 2 x Ulysses 2": ParallelConfig(data_parallel_degree=2, ulysses_degree=2),
    "data 2 x Ring 2": ParallelConfig(data_parallel_degree=2, ring_degree=2),
    "PipeFusion 4": ParallelConfig(pipefusion_degree=4, warmup_steps=ALL),
    "Ulysses 4, sharded": ParallelConfig(ulysses_degree=4, shard_weights=True),
    "Ring 4, sharded": ParallelConfig(ring_degree=4, shard_weights=True),
    "Ulysses 8": ParallelConfig(ulysses_degree=8),
    "Ring 8": ParallelConfig(ring_degree=8),
    "Ulysses 4 x Ring 2": ParallelConfig(ulysses_degree=4, ring_degree=2),
    "Ulysses 2 x Ring 4": ParallelConfig(ulysses_degree=2, ring_degree=4),
    "CFG 2 x Ulysses 4": ParallelConfig(cfg_parallel_degree=2, ulysses_degree=4),
    "CFG 2 x Ring 4": ParallelConfig(cfg_parallel_degree=2, ring_degree=4),
    "CFG 2 x Ulysses 2 x Ring 2": ParallelConfig(cfg_parallel_degree=2, ulysses_degree=2, ring_degree=2),
    "data 8": ParallelConfig(data_parallel_degree=8),
    "data 2 x CFG 2 x Ulysses 2": ParallelConfig(
        data_parallel_degree=2, cfg_parallel_degree=2, ulysses_degree=2
    ),
    "PipeFusion 8": ParallelConfig(pipefusion_degree=8, warmup_steps=ALL),
    "PipeFusion 4 x CFG 2": ParallelConfig(pipefusion_degree=4, cfg_parallel_degree=2, warmup_steps=ALL),
    "PipeFusion 2 x Ulysses 2 x CFG 2": ParallelConfig(
        pipefusion_degree=2, ulysses_degree=2, cfg_parallel_degree=2, warmup_steps=ALL
    ),
    "CFG 2 x Ulysses 4, sharded": ParallelConfig(cfg_parallel_degree=2, ulysses_degree=4, shard_weights=True),
}
