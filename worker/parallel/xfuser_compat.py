"""Everything xfuser 0.7.0 needs to be imported, to run on CPU ranks, and to be exact.

With CUDA the CPU shims (S0-S4, S6) do nothing. The numbers name the findings in
docs/xfuser.md. This module and parallel.py are the only ones that know xfuser.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import itertools
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def import_xfuser() -> types.ModuleType:
    """xfuser, importable whether or not this machine has a GPU, triton or flash-attn."""
    if "xfuser" in sys.modules:
        return sys.modules["xfuser"]
    _stub_block_mask()
    package = importlib.import_module("xfuser") if torch.cuda.is_available() else _import_on_cpu()
    _select_keys()
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


# ------------------------------------------------------------------ what attention sees

# What attention sees of the keys and values (B, heads, keys, width) of one block that the ring brings:
# the first block is number 0, without a ring it is the only one.
KeySelection = Callable[[torch.Tensor, torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]
_selection: list[KeySelection] = []


@contextmanager
def keys_selected(selection: KeySelection) -> Iterator[None]:
    """Within, `selection` stands between the exchange of heads (or blocks) and the attention itself.

    It leaves out padding, which cures B2, B3 and B5 (text or image tokens that the degree does not
    divide, which xfuser answers with a silently wrong image), and under PipeFusion it adds the keys and
    values that are kept.
    """
    _selection.append(selection)
    try:
        yield
    finally:
        _selection.pop()


def _select_keys() -> None:
    usp = importlib.import_module("xfuser.model_executor.layers.usp")
    original = usp._get_attention_function

    def get_attention_function(backend: Any = None) -> Callable[..., Any]:
        """One per call of USP: within it, each call of the attention is the next block of the ring."""
        attention, blocks = original(backend), itertools.count()

        @functools.wraps(attention)
        def selecting(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **kwargs: Any) -> Any:
            if _selection:
                key, value = _selection[-1](key, value, next(blocks))
            return attention(query, key, value, **kwargs)

        return selecting

    usp._get_attention_function = get_attention_function


def parallel_processor(attention: nn.Module) -> Any:
    """xfuser's counterpart of the processor of a diffusers attention module.

    Raises:
        ValueError: xfuser has none for this class.
    """
    from xfuser.model_executor.layers.attention_processor import xFuserAttentionProcessorRegister

    importlib.import_module("xfuser.model_executor.models.transformers.transformer_flux")
    processor = xFuserAttentionProcessorRegister.get_processor(attention.processor)()
    if type(processor).__name__ == "xFuserJointAttnProcessor2_0":
        return ImageAttnProcessor() if attention.added_kv_proj_dim is None else JointAttnProcessor(processor)
    return processor


class JointAttnProcessor:
    """xfuser's joint attention of SD3 without its KV cache, and for calls without text.

    B1: xfuser updates its cache twice. And where a patch brings no text tokens its reshapes fail.
    """

    def __init__(self, joint: Any):
        self._joint, self._image = joint, ImageAttnProcessor()
        joint.use_long_ctx_attn_kvcache = True  # whose other meaning is that the cache is elsewhere

    def __call__(
        self, attn: nn.Module, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if encoder_hidden_states.shape[1] == 0:
            return self._image(attn, hidden_states), encoder_hidden_states
        return self._joint(attn, hidden_states, encoder_hidden_states, **kwargs)


class ImageAttnProcessor:
    """Self-attention of image tokens alone (`attn2` of SD3.5 medium) over USP.

    B7: xFuserJointAttnProcessor2_0 reads an unset `joint_strategy` when there is no text.
    """

    def __call__(self, attn: nn.Module, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
        from xfuser.model_executor.layers.usp import USP

        query, key, value = (
            projection(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for projection in (attn.to_q, attn.to_k, attn.to_v)
        )
        if attn.norm_q is not None:
            query, key = attn.norm_q(query), attn.norm_k(key)
        output = USP(query, key, value, attn_layer=attn).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](output.to(hidden_states.dtype)))


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
