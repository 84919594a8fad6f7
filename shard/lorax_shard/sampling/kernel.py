"""Draws many rows at once on a CPU, by a kernel that is compiled when it is first asked for.

The softmax between its two halves is torch's, as in ``reference``: the same probabilities, and
so the same tokens. The likeliest token of logits as they are needs none.
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
from lorax_shard.sampling.masks import NO_MASKS, Masks
from lorax_shard.sampling.sampled import (
    LEAST_LOGPROB,
    NO_TOKEN,
    SampledTokens,
    most_alternatives,
)
from lorax_shard.sampling.scores import SamplerRow
from lorax_shard.sampling.table import (
    KnownSettings,
    RowSettings,
    likeliest_table,
    make_table,
    take_likeliest,
)
from lorax_shard.sampling.watermark import Watermark

_SOURCE = Path(__file__).with_name("draw.cpp")
# Rows whose softmax is held at once; more, if it is as small.
_ROWS_AT_ONCE = 32
_VALUES_AT_ONCE = 1 << 20
_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64


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
        self._settings = KnownSettings()

    @classmethod
    def probe(cls) -> str | None:
        """Return why the kernel cannot be built or loaded here, or None."""
        return _library()[1]

    # The memory that it keeps is that of one mode.
    @torch.inference_mode()
    def __call__(
        self,
        logits: torch.Tensor,
        rows: Sequence[SamplerRow],
        watermark: Watermark,
        masks: Masks = NO_MASKS,
    ) -> SampledTokens:
        """Return the next token of each row of ``logits``; none for rows without numbers."""
        if logits.dtype is not torch.float32 or logits.stride(1) != 1:
            logits = logits.float().contiguous()
        result = SampledTokens([], [], [])
        settings = self._settings.of(rows)
        at_once = max(_ROWS_AT_ONCE, _VALUES_AT_ONCE // logits.shape[1])
        for start in range(0, len(rows), at_once):
            part = slice(start, start + at_once)
            own = {at - start: mask for at, mask in masks.items() if 0 <= at - start < at_once}
            self._sample(logits[part], rows[part], settings[part], watermark, own, result)
        return result

    def _sample(
        self,
        logits: torch.Tensor,
        rows: Sequence[SamplerRow],
        settings: Sequence[RowSettings],
        watermark: Watermark,
        masks: Masks,
        result: SampledTokens,
    ) -> None:
        """Add the tokens of some rows to the result."""
        library, reason = _library()
        assert library is not None, reason  # whoever makes this asks first
        vocab_size = logits.shape[1]
        places = _HostPlaces()
        if take_likeliest(rows, settings, masks):
            table, num_lines = likeliest_table(len(rows)), 0
        else:
            table, num_lines = make_table(rows, settings, vocab_size, watermark, masks, places)
        lines, probs = self._memory(num_lines, vocab_size)
        most = most_alternatives(rows)
        ids = np.full(len(rows), NO_TOKEN, dtype=np.int64)
        logprobs = np.full(len(rows), LEAST_LOGPROB)
        best = np.full((len(rows), most), NO_TOKEN, dtype=np.int64)
        best_logprobs = np.empty((len(rows), most))
        batch = _BatchArguments(
            logits.data_ptr(), logits.stride(0), vocab_size, lines.data_ptr(), probs.data_ptr(),
            table.ctypes.data, len(rows), watermark.delta, most, torch.get_num_threads(),
            ids.ctypes.data, logprobs.ctypes.data, best.ctypes.data, best_logprobs.ctypes.data,
        )  # fmt: skip
        if num_lines:
            library.lorax_prepare_draws(ctypes.byref(batch))
            torch.softmax(lines, dim=-1, out=probs)
        library.lorax_finish_draws(ctypes.byref(batch))
        logprobs[ids == NO_TOKEN] = LEAST_LOGPROB
        result.ids += ids.tolist()
        result.logprobs += logprobs.tolist()
        if not most:
            result.alternatives += [None] * len(rows)
            return
        for row, token_id, few, few_logprobs in zip(rows, ids, best, best_logprobs, strict=True):
            found = few >= 0
            is_asked = row.params.num_alternatives and token_id != NO_TOKEN
            both = (few[found].tolist(), few_logprobs[found].tolist())
            result.alternatives.append(both if is_asked else None)

    def _memory(self, num_lines: int, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return room for the lines and for their softmax."""
        size = num_lines * vocab_size
        if self._lines.numel() < size:
            self._lines, self._probs = torch.empty(size), torch.empty(size)
        shape = (num_lines, vocab_size)
        return self._lines[:size].view(shape), self._probs[:size].view(shape)


class _HostPlaces:
    """Arrays that a table points to, kept as long as it does; implements Places."""

    def __init__(self) -> None:
        self._held: list[object] = []

    def place(self, values: NDArray[Any]) -> int:
        """Return where an array is."""
        values = np.ascontiguousarray(values)
        self._held.append(values)
        return int(values.__array_interface__["data"][0])

    place_prompt = place


@functools.cache
def _library() -> tuple[Any, str | None]:
    """Return the library, or None and the reason in words."""
    library, reason = load_library(_SOURCE)
    if library is None:
        return None, reason
    for function in (library.lorax_prepare_draws, library.lorax_finish_draws):
        function.argtypes, function.restype = (_POINTER,), None
    return library, None
