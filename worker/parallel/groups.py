"""The ranks' process groups, and how tokens and batches are spread over them."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import nn

from comfy_xdit.protocol.parallel import ParallelConfig
from comfy_xdit.protocol.rpc import Rank
from worker.clock import communication
from worker.parallel import xfuser_compat
from worker.parallel.attention.blockwise import WithLogSumExp
from worker.parallel.mesh import Mesh, arrive, gather_parts
from worker.parallel.parts import Shard
from worker.parallel.pipeline import Pipeline
from worker.parallel.staged import backend_of

# Longer than any step; a hung peer is found by the host long before.
COLLECTIVE = timedelta(minutes=30)


@dataclass(frozen=True)
class Degrees:
    """The degrees of this group.

    `branches` are ranks that take different rows of a batch: data parallel times CFG parallel. To a
    transformer call it makes no difference whether two rows are two pictures or two prompts.
    `stages` are ranks that have different blocks of the transformer (PipeFusion).
    `sharded`: the ranks of one stage share its weights, instead of having them all.
    """

    branches: int
    ulysses: int
    ring: int
    stages: int
    sharded: bool = False

    @classmethod
    def of(cls, parallel: ParallelConfig) -> Degrees:
        """The degrees of a layout."""
        branches = parallel.data_parallel_degree * parallel.cfg_parallel_degree
        stages, sharded = parallel.pipefusion_degree, parallel.shard_weights
        return cls(branches, parallel.ulysses_degree, parallel.ring_degree, stages, sharded)

    @property
    def sequence(self) -> int:
        """Ranks that share one sequence of tokens (USP)."""
        return self.ulysses * self.ring

    @property
    def shards(self) -> int:
        """Ranks that share the weights of one stage; 1 where each has them all."""
        return self.branches * self.sequence if self.sharded else 1


class RankGroups:
    """This rank's place among the ranks. Made once per process: a new layout is new processes."""

    def __init__(self, end: Rank, degrees: Degrees, device: torch.device):
        self.rank, self.world_size, self.degrees, self.device = end.rank, end.world_size, degrees, device
        self._control: dist.ProcessGroup | None = None
        self.pipeline: Pipeline | None = None
        if self.world_size > 1:
            backend = backend_of(device)
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if backend == "nccl" else backend, store=end.group_store(),
                rank=self.rank, world_size=self.world_size, timeout=COLLECTIVE,
            )  # fmt: skip
            self._control = dist.new_group(backend="gloo", timeout=COLLECTIVE)
            self._join_xfuser(backend)
        if degrees.stages > 1:
            self.pipeline = Pipeline(self._stage_ranks(), self.rank, device, COLLECTIVE)
        self.shard_group: dist.ProcessGroup | None = None
        if degrees.shards > 1:
            # Of its own: weights come while other groups exchange tokens.
            stages = zip(*self._stage_ranks(), strict=True)
            groups = {ranks: dist.new_group(list(ranks), timeout=COLLECTIVE) for ranks in stages}
            self.shard_group = next(group for ranks, group in groups.items() if self.rank in ranks)

    def agree(self, flag: bool) -> bool:
        """Rank 0's flag, on every rank. On gloo: it works whatever the GPUs are doing."""
        if self._control is None:
            return flag
        word = torch.tensor([flag], dtype=torch.int32)
        with communication:
            dist.broadcast(word, 0, group=self._control)
        return bool(word.item())

    def announce(self, flag: bool) -> Announcement:
        """As `agree`, but rank 0 goes on at once; others wait when they ask."""
        word = torch.tensor([flag], dtype=torch.int32)
        return Announcement(word, dist.broadcast(word, 0, group=self._control, async_op=True))

    def any(self, flag: bool) -> bool:
        """Whether any rank has the flag; on every rank."""
        if self._control is None:
            return flag
        word = torch.tensor([flag], dtype=torch.int32)
        with communication:
            dist.all_reduce(word, dist.ReduceOp.MAX, group=self._control)
        return bool(word.item())

    def differ(self, word: str) -> bool:
        """Whether the ranks have different words; on every rank."""
        if self._control is None:
            return False
        number = int.from_bytes(hashlib.sha256(word.encode()).digest()[:7], "big")
        span = torch.tensor([number, -number])
        with communication:
            dist.all_reduce(span, dist.ReduceOp.MAX, group=self._control)
        return bool(span.sum() != 0)

    @property
    def everyone(self) -> dist.ProcessGroup | None:
        """All ranks, whatever their degrees; None where there is one."""
        return dist.group.WORLD if self.world_size > 1 else None

    @property
    def branch(self) -> int:
        """Which part of a batch this rank computes."""
        return self.rank // (self.degrees.sequence * self.degrees.stages)

    @property
    def stage(self) -> int:
        """Which part of the blocks this rank has."""
        return self.rank // self.degrees.sequence % self.degrees.stages

    @property
    def sequence_rank(self) -> int:
        """Which part of the tokens this rank computes."""
        return self.rank % self.degrees.sequence

    @cached_property
    def mesh(self) -> Mesh:
        """The ranks that share this rank's sequence of tokens. Its process groups are xfuser's."""
        ulysses, ring = self.degrees.ulysses, self.degrees.ring
        if self.degrees.sequence == 1:
            return Mesh()
        from xfuser.core.distributed import get_sp_group

        found = get_sp_group()
        groups = (found.ulysses_group, found.ring_group, found.device_group)
        return Mesh(ulysses, ring, self.sequence_rank, *groups)

    def rows(self, count: int) -> Shard | None:
        """How the rows of a batch are spread over the branches; None where every branch computes all."""
        return None if self.degrees.branches == 1 or count == 1 else Shard(count, self.degrees.branches)

    def gather_rows(self, rows: torch.Tensor, shard: Shard) -> torch.Tensor:
        """All rows of a batch, in their order, of which this rank's branch has `rows` (n, ...)."""
        from xfuser.core.distributed import get_dp_group

        return torch.cat(gather_parts(rows, shard.sizes, 0, get_dp_group().device_group))

    def _stage_ranks(self) -> list[list[int]]:
        """Of every pipeline its ranks, stage after stage: xfuser's order (its `get_pp_group`)."""
        sequence, stages = self.degrees.sequence, self.degrees.stages
        firsts = [
            branch * stages * sequence + rank
            for branch in range(self.degrees.branches)
            for rank in range(sequence)
        ]
        return [[first + stage * sequence for stage in range(stages)] for first in firsts]

    def _join_xfuser(self, backend: str) -> None:
        """B6: xfuser's own CFG group gives wrong shapes for Flux; its data-parallel group is right."""
        xfuser_compat.import_xfuser()
        from xfuser.core import distributed

        distributed.init_distributed_environment(backend=backend, local_rank=int(os.environ["LOCAL_RANK"]))
        with xfuser_compat.same_ranks_same_group():
            distributed.initialize_model_parallel(
                data_parallel_degree=self.degrees.branches,
                sequence_parallel_degree=self.degrees.sequence,
                pipeline_parallel_degree=self.degrees.stages,
                ulysses_degree=self.degrees.ulysses,
                ring_degree=self.degrees.ring,
                backend=backend,
            )
        if distributed.get_pp_group().ranks not in self._stage_ranks():
            raise RuntimeError(f"xfuser puts rank {self.rank} into {distributed.get_pp_group().ranks}")


@dataclass(frozen=True)
class Announcement:
    """Rank 0's flag on its way."""

    word: torch.Tensor
    work: dist.Work

    def wait(self) -> bool:
        """The flag, once it is here."""
        arrive([self.work])
        return bool(self.word.item())


def _attention_backend(degrees: Degrees) -> str | None:
    """xfuser's name of the attention to use; None lets xfuser choose.

    A ring adds up blocks by their log-sum-exp, which PyTorch's plain attention keeps to itself: on a
    GPU xfuser finds one that gives it (half precision only), on CPU there is S6. Without a ring
    PyTorch's own choice among its kernels takes every dtype and shape.
    """
    if degrees.ring == 1:
        return "SDPA"
    return None if torch.cuda.is_available() else "SDPA_FLASH"


def ring_kernel(transformer: nn.Module, groups: RankGroups) -> WithLogSumExp | None:
    """xfuser's attention with log-sum-exp for the blocks of a ring; None where ours is all there is."""
    if groups.degrees.ring == 1 or groups.device.type != "cuda":
        return None
    _start_runtime_state(transformer, groups.degrees)
    return xfuser_compat.block_attention()


def _start_runtime_state(transformer: nn.Module, degrees: Degrees) -> None:
    """xfuser's attention asks a global state for its backend; it wants a pipeline to be made of."""
    from xfuser import xFuserArgs
    from xfuser.core.distributed import runtime_state as state

    if state._RUNTIME is not None:
        return
    pipeline = type("FluxPipeline", (SimpleNamespace,), {})(transformer=transformer, vae_scale_factor=8)
    config, _ = xFuserArgs(
        model="comfy_xdit",
        data_parallel_degree=degrees.branches,
        ulysses_degree=degrees.ulysses,
        ring_degree=degrees.ring,
        pipefusion_parallel_degree=degrees.stages,
        num_pipeline_patch=1,  # for xfuser's KV cache, which is not used
        attention_backend=_attention_backend(degrees),
    ).create_config()
    config.runtime_config.dtype = next(transformer.parameters()).dtype  # S8: fp16 by default
    state.initialize_runtime_state(pipeline, config)
    state.get_runtime_state().split_text_embed_in_sp = True
    # Flux's processor reads it in every call, and uses it under PipeFusion only.
    state.get_runtime_state().max_condition_sequence_length = 0
