"""What a ring adds up: attention and its log-sum-exp, of every kernel that is there, against float64."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch

from tests.gpu.device import DEVICE, DTYPES, HAS_GPU
from tests.tiny import relative_l2
from worker.parallel import import_xfuser
from worker.parallel.attention.blockwise import Blockwise, WithLogSumExp, with_log_sum_exp

HEADS, WIDTH = 4, 64
QUERIES, KEYS = 130, (257, 128, 65)  # blocks of a ring, uneven
OURS = "ours"
# xfuser's choice without flash-attn is CUDNN; the last ones need packages of their own.
ON_GPU = ["CUDNN", "SDPA_EFFICIENT", "FLASH", "FLASH_3"]
NAMES = [OURS, "SDPA_FLASH", *(ON_GPU if HAS_GPU else [])]
HALVES = ["bf16", "fp16"]
ERROR = {"fp32": 1e-5, "fp16": 1e-3, "bf16": 8e-3}  # of an output that is rounded to the dtype once or twice
SUM = 2e-3  # absolute, of a log-sum-exp, whose scores are sums of products of halves


def kernel(name: str) -> WithLogSumExp:
    """By xfuser's name, as `worker.parallel.xfuser_compat.block_attention` calls it."""
    if name == OURS:
        return lambda query, key, value: with_log_sum_exp(query, key, value, None, None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import_xfuser()
        from xfuser.core.distributed import attention_backend as backends
    call: Callable = backends.ATTENTION_FUNCTION_REGISTRY[backends.AttentionBackendType[name]]
    needs = {"FLASH": "has_flash_attn", "FLASH_3": "has_flash_attn_3"}.get(name)
    if needs and not backends.env_info[needs]:
        pytest.skip(f"{name} is not installed")
    return lambda query, key, value: call(query, key, value, dropout_p=0.0, is_causal=False)


def tensors(dtype: str, queries: int = QUERIES) -> tuple[torch.Tensor, list[tuple[torch.Tensor, ...]]]:
    """Queries, and blocks of keys and values."""
    generator = torch.Generator().manual_seed(1)

    def made(tokens: int) -> torch.Tensor:
        return torch.randn(1, HEADS, tokens, WIDTH, generator=generator).to(DEVICE, DTYPES[dtype])

    query = 2 * made(queries)
    return query, [(made(tokens), made(tokens)) for tokens in KEYS]


def reference(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """In float64."""
    scores = query.double() @ key.double().mT * WIDTH**-0.5
    return scores.softmax(-1) @ value.double(), scores.logsumexp(-1)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", NAMES)
def test_a_block_and_its_log_sum_exp(name: str, dtype: str):
    query, blocks = tensors(dtype)
    for key, value in blocks:
        out, lse = kernel(name)(query, key, value)
        wanted, wanted_lse = reference(query, key, value)
        assert lse.shape == (1, HEADS, QUERIES), "as Blockwise takes it"
        assert relative_l2(out, wanted) <= ERROR[dtype]
        assert (lse.double() - wanted_lse).abs().max() <= SUM


@pytest.mark.parametrize("queries", [QUERIES, 1])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", NAMES)
def test_blocks_add_up_to_the_attention_to_all_keys(name: str, dtype: str, queries: int):
    query, blocks = tensors(dtype, queries)
    ring = Blockwise(query, None, None if name == OURS else kernel(name))
    for key, value in blocks:
        ring.add(key, value, None)
    whole = (torch.cat(one, 2) for one in zip(*blocks, strict=True))
    assert relative_l2(ring.result, reference(query, *whole)[0]) <= ERROR[dtype]


def counting(key: torch.Tensor) -> torch.Tensor:
    """Two of three keys."""
    return torch.arange(key.shape[2], device=key.device) % 3 > 0


@pytest.mark.parametrize("dtype", [*HALVES, "fp32"])
def test_masked_keys_count_for_nothing(dtype: str):
    """A bias of an odd number of keys, one row for all heads; of the first block nothing is seen."""
    query, blocks = tensors(dtype)
    ring = Blockwise(query, None)
    for number, (key, value) in enumerate(blocks):
        seen = counting(key) if number else torch.zeros_like(counting(key))
        ring.add(key, value, seen[None, None, None])
    kept = [torch.cat([t[:, :, counting(t)] for t in one], 2) for one in zip(*blocks[1:], strict=True)]
    assert relative_l2(ring.result, reference(query, *kept)[0]) <= ERROR[dtype]
