"""Draws the rows of a batch in at most six launches, on a GPU.

The softmax between two of them is torch's, as in ``reference``: the same probabilities, and so the
same tokens. What rows ask for goes to the device in one copy, and what was drawn comes back in one.
No kernel is specialised on what varies from step to step, so that a ``trial`` compiles all there is.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from lorax_shard.sampling.device_tokens import DeviceTokens
from lorax_shard.sampling.id_tree import BLOCK, num_levels
from lorax_shard.sampling.masks import NO_MASKS, Masks
from lorax_shard.sampling.reference import softmax_width
from lorax_shard.sampling.sampled import (
    ALL_MASKED,
    NO_NUMBERS,
    SampledTokens,
    nothing_sampled,
)
from lorax_shard.sampling.scores import SamplerRow
from lorax_shard.sampling.table import ROW, KnownSettings, RowSettings, make_table
from lorax_shard.sampling.triton import choice, limits, scores
from lorax_shard.sampling.triton.upload import KeptPrompts, Upload
from lorax_shard.sampling.watermark import Watermark

# Sums and products are rounded one by one, as in the specification.
_OPTIONS: dict[str, Any] = {"num_warps": 16, "num_stages": 1, "enable_fp_fusion": False}
# Numbers that are read at once.
_VECTOR = 4
_MASKED = -2

# Legend: S sampled rows, L softmaxes, V vocabulary, A alternatives.


class TritonDraws:
    """Samples rows; keeps what follows from their parameters.

    Args:
        block: values that a program looks at together; a power of two, at least 256.
        capacity: tokens that it puts together once so few are in question.
    """

    def __init__(self, block: int = 4096, capacity: int = 8192) -> None:
        self._settings = KnownSettings()
        self._prompts = KeptPrompts()
        self._block, self._capacity = block, capacity

    def __call__(
        self,
        logits: torch.Tensor,
        rows: Sequence[SamplerRow],
        watermark: Watermark,
        masks: Masks = NO_MASKS,
    ) -> DeviceTokens:
        """Return the next token of each row of ``logits`` (S x V); none for rows without numbers.

        Nothing here waits for the device.
        """
        if logits.dtype is not torch.float32 or logits.stride(1) != 1:
            logits = logits.float().contiguous()
        settings = self._settings.of(rows)
        upload = Upload(self._prompts, logits.device)
        batch = _make_batch(rows, settings, logits.shape[1], watermark, masks, upload)
        ids, found = self._launch(logits, batch, settings, watermark.delta)
        understand = functools.partial(_tokens, batch.is_line, batch.num_alternatives)
        return DeviceTokens(ids, found, understand)

    def _launch(
        self,
        logits: torch.Tensor,
        batch: _Batch,
        settings: Sequence[RowSettings],
        delta: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # S, S x (3 + 2A)
        """Return ids, and what their logprobs and alternatives are made of."""
        vocab_size, device = logits.shape[1], logits.device
        width = softmax_width(vocab_size, device)
        unit = _VECTOR if width % _VECTOR == 0 else 1
        num_rows, num_lines, table = len(settings), batch.num_lines, batch.table
        num_best = max(batch.num_alternatives)

        def empty(*size: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(size, dtype=dtype, device=device)

        lines = empty(num_lines, width, dtype=torch.float32)
        # The memory of the softmax is where tokens are counted before.
        probs = torch.empty_like(lines)
        line_bits, bits = lines.view(torch.int32), probs.view(torch.int32)
        best, left = empty(num_lines, dtype=torch.int64), empty(num_lines, 4, dtype=torch.int32)
        is_aligned = logits.data_ptr() % (4 * _VECTOR) == 0 and logits.stride(0) % _VECTOR == 0
        sizes = {"block": self._block, "line_unit": unit, **_OPTIONS}
        scores.prepare[(num_lines,)](
            logits, logits.stride(0), table, vocab_size, lines, width, bits, delta, best, left,
            unit=_VECTOR if is_aligned else 1, **sizes,
        )  # fmt: skip
        torch.softmax(lines, dim=-1, out=probs)
        few = empty(num_rows, 2 * self._capacity, dtype=torch.int32)
        if any(each.has_top for each in settings):
            limits.keep_top[(num_rows,)](
                table, best, bits, vocab_size, width, left, few, capacity=self._capacity, **sizes
            )
        if any(each.has_typical for each in settings):
            limits.keep_typical[(num_rows,)](
                table, best, bits, line_bits, width, left, few, capacity=self._capacity, **sizes
            )
        ids, columns = empty(num_rows, dtype=torch.int64), 3 + 2 * num_best
        found = empty(num_rows, columns, dtype=torch.float64)
        num_blocks = -(-vocab_size // BLOCK)
        choice.choose[(num_rows,)](
            table, best, lines, bits, width, num_levels(vocab_size), num_blocks, left,
            empty(num_rows, num_blocks, dtype=torch.int64), ids, found, columns, **sizes,
        )  # fmt: skip
        if num_best:
            choice.list_alternatives[(num_rows,)](
                table, line_bits, bits, width, left, few, ids, found, columns, num_best,
                capacity=self._capacity, **sizes,
            )  # fmt: skip
        return ids, found


class _Batch(NamedTuple):
    """What the kernels are told of rows, and what is done with what they find."""

    # L lines on the device, within what was uploaded with it.
    table: torch.Tensor
    num_lines: int
    # Whether what is reported of a row is read from a line, not from what is drawn from.
    is_line: NDArray[np.bool_]
    num_alternatives: list[int]


def _make_batch(
    rows: Sequence[SamplerRow],
    settings: Sequence[RowSettings],
    vocab_size: int,
    watermark: Watermark,
    masks: Masks,
    upload: Upload,
) -> _Batch:
    table, num_lines = make_table(rows, settings, vocab_size, watermark, masks, upload)
    is_line = (table["temperature"] <= 0) | (table["raw_line"] >= 0)
    num_alternatives = table["num_alternatives"].tolist()
    if num_lines > len(rows):
        plain = np.zeros(num_lines - len(rows), dtype=ROW)
        plain["raw_line"] = -1
        plain["source"] = raw = np.flatnonzero(table["raw_line"] >= 0)
        for name in ("allowed", "num_allowed"):
            plain[name] = table[name][raw]
        table = np.concatenate([table, plain])
    return _Batch(upload.send(table), num_lines, is_line, num_alternatives)


def _tokens(
    is_line: NDArray[np.bool_], counts: Sequence[int], found: torch.Tensor
) -> SampledTokens:
    """Return what the numbers say, which are on the host."""
    numbers = found.numpy()
    result = nothing_sampled(len(numbers))
    with np.errstate(divide="ignore", invalid="ignore"):
        scales = np.log(numbers[:, 2])
        logprobs = _logprobs(numbers[:, 1], scales, is_line)
    num_best = (numbers.shape[1] - 3) // 2
    ids = numbers[:, 0].astype(np.int64).tolist()
    for index, (token_id, logprob, count) in enumerate(
        zip(ids, logprobs.tolist(), counts, strict=True)
    ):
        if token_id < 0:
            result.fail(index, ALL_MASKED if token_id == _MASKED else NO_NUMBERS)
            continue
        result.ids[index], result.logprobs[index] = token_id, logprob
        if count:
            best, values = numbers[index, 3 : 3 + count], numbers[index, 3 + num_best :][:count]
            # Those that are there, best first, ties by id.
            order = np.lexsort((best, -values))
            order = order[best[order] >= 0]
            few = _logprobs(values[order], scales[index], is_line[index])
            result.alternatives[index] = best[order].astype(np.int64).tolist(), few.tolist()
    return result


def _logprobs(values: NDArray[np.float64], scales: Any, is_line: Any) -> NDArray[np.float64]:
    """Return the logprobs of values of lines, which lie below the largest, or of probabilities."""
    drawn = np.log(np.where(is_line, 1.0, values)) - scales
    return np.asarray(np.where(is_line, values + scales, drawn))
