"""Passes over rows that are nobody's: single tokens behind a context, or a piece of a prompt."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lorax_shard.model.interface import PassNumbers


def decode_pass(
    num_rows: int, context: int, block_size: int, vocab_size: int, slots: Sequence[int] = ()
) -> PassNumbers:
    """Return a pass of one token a row, each behind ``context`` tokens of its own; row i has slot i mod N."""
    width = context // block_size + 1
    rows = np.arange(num_rows)
    tables = rows[:, None] * width + np.arange(width)
    places = tables[:, context // block_size] * block_size + context % block_size
    of_rows = [slots[row % len(slots)] if slots else None for row in range(num_rows)]
    return _numbers(
        _ids(num_rows, vocab_size), np.full(num_rows, context), places, tables,
        [1] * num_rows, [context + 1] * num_rows, rows, of_rows,
    )  # fmt: skip


def prompt_pass(num_tokens: int, block_size: int, vocab_size: int) -> PassNumbers:
    """Return a pass of one prompt, from its first token on; the logits of its last one are asked for."""
    places = np.arange(num_tokens)
    tables = np.arange(-(-num_tokens // block_size))[None, :]
    return _numbers(
        _ids(num_tokens, vocab_size), places, places, tables,
        [num_tokens], [num_tokens], np.array([num_tokens - 1]), [None],
    )  # fmt: skip


def num_blocks(num_rows: int, context: int, block_size: int) -> int:
    """Return how many blocks a pass of such rows needs."""
    return num_rows * (context // block_size + 1)


def _ids(number: int, vocab_size: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return (np.arange(number, dtype=np.int64) * 7919 + 31) % vocab_size


def _numbers(
    ids: np.ndarray[tuple[int], np.dtype[np.int64]],
    positions: np.ndarray[tuple[int], np.dtype[np.int64]],
    places: np.ndarray[tuple[int], np.dtype[np.int64]],
    tables: np.ndarray[tuple[int, int], np.dtype[np.int64]],
    query_lens: list[int],
    context_lens: list[int],
    logit_rows: np.ndarray[tuple[int], np.dtype[np.int64]],
    slots: list[int | None],
) -> PassNumbers:
    return PassNumbers(
        input_ids=ids,
        positions=positions.astype(np.int64),
        kv_slots=places.astype(np.int64),
        tables=tables.astype(np.int64),
        query_lens=query_lens,
        context_lens=context_lens,
        num_decode_rows=sum(each == 1 for each in query_lens),
        logit_rows=logit_rows.astype(np.int64),
        slots=slots,
        slot_lens=query_lens,
    )
