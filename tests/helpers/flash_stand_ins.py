"""Stand-ins for the functions of flash attention: they compute, slowly, what they promise.

Each takes the arguments of the function whose name it bears: one that is wrong, of a wrong type or
missing gives a wrong result or an error.
"""

from __future__ import annotations

import sys
from typing import Any

import torch


def is_int32(*tensors: torch.Tensor) -> None:
    for tensor in tensors:
        assert tensor.dtype is torch.int32
        assert tensor.is_contiguous()


def paged_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    starts: torch.Tensor,
    lengths: list[int],
    table: torch.Tensor,
    longest_query: int,
    longest_context: int,
    scale: float,
    window: tuple[int, int],
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention over pages, queries at the end of their contexts, within (left, right)."""
    is_int32(starts, table)
    assert starts[0] == 0
    assert starts[-1] == q.shape[0]
    assert table.shape[0] == len(lengths) == starts.shape[0] - 1
    assert q.dtype in (torch.float16, torch.bfloat16)
    output = torch.zeros(*q.shape[:2], v.shape[-1], dtype=q.dtype)
    for row, length in enumerate(lengths):
        first, last = int(starts[row]), int(starts[row + 1])
        # A kernel is launched for the longest row that it was told of, and no further.
        last = min(last, first + longest_query)
        keys, values = (pages[table[row].long()].flatten(0, 1)[:length] for pages in (k, v))
        at = torch.arange(length)
        query_at = length - int(starts[row + 1]) + torch.arange(first, last)[:, None]
        seen = (at < longest_context).expand(last - first, -1).clone()
        left, right = window
        if left >= 0:
            seen &= at >= query_at - left
        if right >= 0:
            seen &= at <= query_at + right
        group = q.shape[1] // k.shape[2]
        for head in range(q.shape[1]):
            scores = q[first:last, head].double() @ keys[:, head // group].double().T * scale
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            weights = scores.exp() * seen
            total = weights.sum(1, keepdim=True)
            if sinks is not None:
                total += sinks[head].double().exp()
            output[first:last, head] = (weights / total @ values[:, head // group].double()).to(
                q.dtype
            )
    return output


def as_pages(k: Any, v: Any, cu_seqlens_k: Any) -> tuple[Any, Any, Any]:
    """Return packed K and V as pages of one token each, and their table."""
    assert k.dim() == v.dim() == 3
    assert k.stride(-1) == v.stride(-1) == 1
    starts, lengths = cu_seqlens_k[:-1, None], cu_seqlens_k.diff()
    table = starts + torch.arange(int(lengths.max()), dtype=torch.int32)
    return k.unsqueeze(1), v.unsqueeze(1), table.clamp(max=len(k) - 1)


def flash_attn_varlen_func_v2(
    q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: int,
    max_seqlen_k: int, dropout_p: float = 0.0, softmax_scale: float | None = None,
    causal: bool = False, window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    block_table: Any = None,
) -> torch.Tensor:  # fmt: skip
    if block_table is None:
        k, v, block_table = as_pages(k, v, cu_seqlens_k)
    else:
        assert k.shape[1] % 256 == 0
    is_int32(cu_seqlens_k)
    left, right = window_size
    return paged_attention(
        q, k, v, cu_seqlens_q, cu_seqlens_k.diff().tolist(), block_table, max_seqlen_q,
        max_seqlen_k, softmax_scale, (left, 0 if causal else right), softcap,
    )  # fmt: skip


def flash_attn_with_kvcache_v3(
    q: Any, k_cache: Any, v_cache: Any, k: Any = None, v: Any = None, qv: Any = None,
    cache_seqlens: Any = None, page_table: Any = None, cu_seqlens_q: Any = None,
    max_seqlen_q: int | None = None, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, num_splits: int = 0,
) -> torch.Tensor:  # fmt: skip
    is_int32(cache_seqlens)
    left, right = window_size
    return paged_attention(
        q, k_cache, v_cache, cu_seqlens_q, cache_seqlens.tolist(), page_table, max_seqlen_q,
        sys.maxsize, softmax_scale, (left, 0 if causal else right), softcap,
    )  # fmt: skip


def flash_attn_varlen_func_v4(
    q: Any, k: Any, v: Any, cu_seqlens_q: Any = None, cu_seqlens_k: Any = None,
    max_seqlen_q: int | None = None, max_seqlen_k: int | None = None, seqused_q: Any = None,
    seqused_k: Any = None, page_table: Any = None, softmax_scale: float | None = None,
    causal: bool = False, window_size: tuple[int | None, int | None] = (None, None),
    learnable_sink: Any = None, softcap: float = 0.0, num_splits: int = 1,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    assert cu_seqlens_k is None
    assert learnable_sink is None or learnable_sink.dtype is torch.bfloat16
    is_int32(seqused_k)
    left, right = (-1 if reach is None else reach for reach in window_size)
    output = paged_attention(
        q, k, v, cu_seqlens_q, seqused_k.tolist(), page_table, max_seqlen_q, max_seqlen_k,
        softmax_scale, (left, 0 if causal else right), softcap, learnable_sink,
    )  # fmt: skip
    return output, None


def varlen_attn(
    query: Any, key: Any, value: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int, *,
    return_aux: Any = None, scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False, seqused_k: Any = None,
    block_table: Any = None, num_splits: int | None = None,
) -> torch.Tensor:  # fmt: skip
    assert enable_gqa
    assert num_splits == 1
    is_int32(cu_seq_k)
    if block_table is None:
        assert seqused_k is None
        key, value, block_table = as_pages(key, value, cu_seq_k)
    else:
        assert key.shape[1] % 256 == 0
        is_int32(seqused_k)
        assert cu_seq_k.diff().tolist() == seqused_k.tolist()
    lengths = cu_seq_k.diff().tolist()
    return paged_attention(
        query, key, value, cu_seq_q, lengths, block_table, max_q, max_k, scale, window_size
    )
