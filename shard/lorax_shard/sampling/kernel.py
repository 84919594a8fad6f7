"""Draws many rows at once on a CPU, by a kernel that is compiled when it is first asked for.

The softmax between its two halves is torch's, as in ``reference``: the same probabilities, and
so the same tokens.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lorax_shard.native import load_library
from lorax_shard.sampling.sampled import (
    SampledTokens,
    is_greedy,
    is_raw,
    most_alternatives,
    nothing_sampled,
)
from lorax_shard.sampling.scores import SamplerRow, has_penalty
from lorax_shard.sampling.watermark import Watermark

_SOURCE = Path(__file__).with_name("draw.cpp")
# Rows whose softmax is held at once.
_ROWS_AT_ONCE = 32
_MASK_64 = 0xFFFFFFFFFFFFFFFF
_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64

# As draw.cpp has it.
_ROW = np.dtype(
    [
        ("source", "i8"), ("line", "i8"), ("raw_line", "i8"),
        ("temperature", "f8"), ("top_k", "i8"), ("top_p", "f8"), ("typical_p", "f8"), ("min_p", "f8"),
        ("repetition", "f8"), ("frequency", "f8"), ("presence", "f8"),
        ("ids", "i8"), ("num_prompt", "i8"), ("num_ids", "i8"),
        ("edit_ids", "i8"), ("edit_values", "i8"), ("num_edits", "i8"), ("preferred", "i8"),
        ("seed", "u8"), ("position", "u8"), ("num_alternatives", "i8"),
    ]
)  # fmt: skip


class _BatchArguments(ctypes.Structure):
    _fields_ = (
        ("logits", _POINTER), ("stride", _INT), ("vocab_size", _INT),
        ("lines", _POINTER), ("probs", _POINTER), ("rows", _POINTER), ("num_rows", _INT),
        ("delta", ctypes.c_double), ("most_alternatives", _INT), ("num_threads", _INT),
        ("ids", _POINTER), ("logprobs", _POINTER),
        ("alternative_ids", _POINTER), ("alternative_logprobs", _POINTER),
    )  # fmt: skip


class DrawKernel:
    """Samples rows; keeps the memory of a step for the next one."""

    def __init__(self) -> None:
        self._lines = torch.empty(0)
        self._probs = torch.empty(0)

    @classmethod
    def probe(cls) -> str | None:
        """Return why the kernel cannot be built or loaded here, or None."""
        return _library()[1]

    # The memory that it keeps is that of one mode.
    @torch.inference_mode()
    def __call__(
        self, logits: torch.Tensor, rows: Sequence[SamplerRow], watermark: Watermark
    ) -> SampledTokens:
        """Return the next token of each row of ``logits``; none for rows without numbers."""
        if logits.dtype is not torch.float32 or logits.stride(1) != 1:
            logits = logits.float().contiguous()
        result = nothing_sampled(len(rows))
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            part = slice(start, start + _ROWS_AT_ONCE)
            self._sample(logits[part], rows[part], watermark, result, start)
        return result

    def _sample(
        self,
        logits: torch.Tensor,
        rows: Sequence[SamplerRow],
        watermark: Watermark,
        result: SampledTokens,
        start: int,
    ) -> None:
        library, reason = _library()
        assert library is not None, reason  # whoever makes this asks first
        vocab_size = logits.shape[1]
        # What the table points to, kept as long as it does.
        held: list[object] = []
        table, num_lines = _table(rows, vocab_size, watermark, held)
        lines, probs = self._memory(num_lines, vocab_size)
        most = most_alternatives(rows)
        ids = np.full(len(rows), -1, dtype=np.int64)
        logprobs = np.empty(len(rows))
        best = np.full((len(rows), most), -1, dtype=np.int64)
        best_logprobs = np.empty((len(rows), most))
        batch = _BatchArguments(
            logits.data_ptr(), logits.stride(0), vocab_size, lines.data_ptr(), probs.data_ptr(),
            table.ctypes.data, len(rows), watermark.delta, most, torch.get_num_threads(),
            ids.ctypes.data, logprobs.ctypes.data, best.ctypes.data, best_logprobs.ctypes.data,
        )  # fmt: skip
        library.lorax_prepare_draws(ctypes.byref(batch))
        torch.softmax(lines, dim=-1, out=probs)
        library.lorax_finish_draws(ctypes.byref(batch))
        for i, (token_id, logprob) in enumerate(zip(ids.tolist(), logprobs.tolist(), strict=True)):
            if token_id < 0:
                continue
            result.ids[start + i], result.logprobs[start + i] = token_id, logprob
            if rows[i].params.num_alternatives:
                found = best[i] >= 0
                result.alternatives[start + i] = (
                    best[i][found].tolist(), best_logprobs[i][found].tolist(),
                )  # fmt: skip

    def _memory(self, num_lines: int, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return room for the lines and for their softmax."""
        size = num_lines * vocab_size
        if self._lines.numel() < size:
            self._lines, self._probs = torch.empty(size), torch.empty(size)
        shape = (num_lines, vocab_size)
        return self._lines[:size].view(shape), self._probs[:size].view(shape)


def _table(
    rows: Sequence[SamplerRow], vocab_size: int, watermark: Watermark, held: list[object]
) -> tuple[NDArray[np.void], int]:
    """Return the rows as the kernel takes them, and how many lines they need."""
    num_lines = len(rows)
    records = []
    for index, row in enumerate(rows):
        params = row.params
        raw_line = -1
        if is_raw(row):
            raw_line, num_lines = num_lines, num_lines + 1
        ids, edits, preferred = row.token_ids, row.edits, 0
        if params.watermark:
            preferred = _address(watermark.packed(int(ids[-1]), vocab_size), held)
        records.append((
            index, index, raw_line,
            0.0 if is_greedy(params) else params.temperature,
            params.top_k, params.top_p, params.typical_p, params.min_p,
            params.repetition_penalty, params.frequency_penalty, params.presence_penalty,
            _address(ids, held) if has_penalty(params) else 0, row.num_prompt_tokens, len(ids),
            0 if edits is None else _address(edits.ids, held),
            0 if edits is None else _address(edits.values, held),
            0 if edits is None else len(edits.ids),
            preferred, params.seed & _MASK_64, len(ids), params.num_alternatives,
        ))  # fmt: skip
    return np.array(records, dtype=_ROW), num_lines


def _address(values: NDArray[Any], held: list[object]) -> int:
    values = np.ascontiguousarray(values)
    held.append(values)
    return int(values.ctypes.data)


@functools.cache
def _library() -> tuple[Any, str | None]:
    """Return the library, or None and the reason in words."""
    library, reason = load_library(_SOURCE)
    if library is None:
        return None, reason
    for function in (library.lorax_prepare_draws, library.lorax_finish_draws):
        function.argtypes, function.restype = (_POINTER,), None
    return library, None
