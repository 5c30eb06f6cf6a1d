"""One attention on one device: PyTorch's, or one that also gives the log-sum-exp of its scores.

Source of the sum over blocks: Ring Attention, arXiv:2310.01889.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

# Before anything stands in its place (seam.py).
scaled_dot_product_attention = F.scaled_dot_product_attention
# (query, key, value) of (B, heads, n, width) to the attention and the log-sum-exp (B, heads, n).
WithLogSumExp = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
HALF = (torch.float16, torch.bfloat16)
BIAS_ALIGNMENT = 16  # elements: CUDA's efficient attention wants rows of a bias to begin at a multiple


class Blockwise:
    """Attention to keys that come block after block; `result` is that to all of them.

    Args:
        query: (B, heads, n, width).
        scale: of the scores; none is width ** -0.5.
        kernel: a faster one for blocks without a bias, if there is one; it takes half precision only.
    """

    def __init__(self, query: torch.Tensor, scale: float | None, kernel: WithLogSumExp | None = None):
        self._query, self._scale = query, scale
        fits = query.dtype in HALF and scale in (None, query.shape[-1] ** -0.5)
        self._kernel = kernel if fits else None
        self._out = self._lse = torch.empty(0)
        self._empty = True

    def add(self, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Keys and values (B, heads, keys, width) and their bias (B or 1, heads or 1, n or 1, keys)."""
        if key.shape[2] == 0 or self._query.shape[2] == 0:
            return
        if bias is None and self._kernel is not None:
            out, lse = self._kernel(self._query, key, value)
        else:
            out, lse = with_log_sum_exp(self._query, key, value, bias, self._scale)
        out, lse = out.float(), lse.float().unsqueeze(-1)
        if self._empty:
            self._out, self._lse, self._empty = out, lse, False
            return
        # exp(lse) weighs the blocks; written so that nothing overflows, and that a block of which a row sees
        # nothing, whose lse is next to the least number, leaves no trace.
        difference = lse - self._lse
        self._out = torch.lerp(self._out, out, torch.sigmoid(difference))
        self._lse = torch.logaddexp(self._lse, lse)

    @property
    def result(self) -> torch.Tensor:
        """(B, heads, n, width), in the dtype of the query."""
        return self._query.new_empty(self._query.shape) if self._empty else self._out.to(self._query.dtype)


def with_log_sum_exp(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention (B, heads, n, width) and the log-sum-exp (B, heads, n) of its scores.

    Scores are fp32 whatever the dtype, as ComfyUI's `attn_precision` asks for with some models.
    """
    aten = torch.ops.aten
    if bias is not None:
        # A block of which a row may see nothing must weigh nothing beside the others, not be undefined.
        least = torch.finfo(query.dtype).min / 4
        if bias.dtype == torch.bool:
            bias = query.new_zeros(bias.shape).masked_fill_(~bias, least)
        bias = bias.to(query.dtype).clamp_min(least)
        if query.is_cuda:
            bias = aligned(bias)
        bias = bias.expand(query.shape[0], query.shape[1], query.shape[2], -1)
    if not query.is_cuda:
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, attn_mask=bias, scale=scale
        )
        return out, lse
    out, lse, *_ = aten._scaled_dot_product_efficient_attention(query, key, value, bias, True, scale=scale)
    return out, lse[..., : query.shape[2]]  # its rows are padded


def aligned(bias: torch.Tensor) -> torch.Tensor:
    """The same bias, whose rows begin at multiples of BIAS_ALIGNMENT.

    Before it is expanded: one row for all heads and queries stays one row of memory.
    """
    return F.pad(bias, (0, -bias.shape[-1] % BIAS_ALIGNMENT))[..., : bias.shape[-1]]
