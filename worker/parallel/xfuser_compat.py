"""Everything xfuser 0.7.0 needs to be imported, to run on CPU ranks, and to be exact.

With CUDA the CPU shims (S1-S4, S6) do nothing. The numbers name the findings in
docs/xfuser.md. This module and groups.py are the only ones that know xfuser.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from worker.parallel import staged


def import_xfuser() -> types.ModuleType:
    """xfuser, importable whether or not this machine has a GPU, triton or flash-attn."""
    if "xfuser" in sys.modules:
        return sys.modules["xfuser"]
    _stub_block_mask()
    package = importlib.import_module("xfuser") if torch.cuda.is_available() else _import_on_cpu()
    return package


def _stub_block_mask() -> None:
    """S0: core/sparge_attention/block_mask.py imports triton, which xfuser does not require."""
    if importlib.util.find_spec("triton") is not None:
        return
    module = types.ModuleType("xfuser.core.sparge_attention.block_mask")

    def get_block_map_meansim(*_: Any, **__: Any) -> None:
        raise RuntimeError("SpargeAttn needs triton: pip install triton")

    module.get_block_map_meansim = get_block_map_meansim
    sys.modules[module.__name__] = module


def _import_on_cpu() -> types.ModuleType:
    spec = importlib.util.find_spec("xfuser")
    package = importlib.util.module_from_spec(spec)
    sys.modules["xfuser"] = package
    # S1: __init__ asks for the version of a GPU toolkit; envs is patched before it runs.
    envs = importlib.import_module("xfuser.envs")
    envs.get_device_version = lambda: "0.0"
    envs.get_torch_distributed_backend = lambda: "gloo"  # S2
    envs.PACKAGES_CHECKER.packages_info["has_long_ctx_attn"] = True  # S3
    spec.loader.exec_module(package)
    # S4: without CUDA usp.py takes no process groups.
    from yunchang.globals import PROCESS_GROUP

    importlib.import_module("xfuser.model_executor.layers.usp").PROCESS_GROUP = PROCESS_GROUP
    importlib.import_module("xfuser.core.distributed.fp8_comms").PROCESS_GROUP = PROCESS_GROUP
    # S6: the only SDPA that returns the log-sum-exp on CPU.
    backends = importlib.import_module("xfuser.core.distributed.attention_backend")
    backends.ATTENTION_FUNCTION_REGISTRY[backends.AttentionBackendType.SDPA_FLASH] = _flash_on_cpu
    return package


def _flash_on_cpu(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout_p: float,
    is_causal: bool,
    attention_kwargs: dict[str, Any] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p=dropout_p or 0.0, is_causal=bool(is_causal)
    )


@contextlib.contextmanager
def same_ranks_same_group() -> Iterator[None]:
    """S9: of some 23 gloo groups that xfuser makes for two ranks each has a thread that looks around.

    Within, `new_group` of gloo gives those with the same ranks the same group: what they are used for, tokens
    and rows, is exchanged one after the other. NCCL's cost nothing before their first exchange.
    """
    new_group = dist.new_group
    made: dict[tuple[Any, ...], Any] = {}

    def new_or_same(ranks: Sequence[int] | None = None, *args: Any, **options: Any) -> Any:
        backend = options.get("backend") or dist.get_backend()
        if args or ranks is None or backend not in ("gloo", staged.NAME):
            return new_group(ranks, *args, **options)
        same = (backend, *ranks)
        if same not in made:
            made[same] = new_group(ranks, **options)
        return made[same]

    dist.new_group = new_or_same
    try:
        yield
    finally:
        dist.new_group = new_group


def block_attention() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """The attention of xfuser's registry that its runtime state chose: flash-attn, Sage, cuDNN ...

    Of (B, heads, n, width) query, key and value; returns the attention and its log-sum-exp (B, heads, n).
    """
    from xfuser.core.distributed import attention_backend as backends
    from xfuser.core.distributed import get_runtime_state

    attention = backends.ATTENTION_FUNCTION_REGISTRY[get_runtime_state().attention_backend]

    def block(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return attention(query, key, value, dropout_p=0.0, is_causal=False)

    return block
