"""What the kernels that draw are told of rows: a table with one line a row."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from lorax_contract.step import SamplingParams
from lorax_shard.sampling.masks import Masks
from lorax_shard.sampling.sampled import is_greedy, is_raw
from lorax_shard.sampling.scores import SamplerRow, has_penalty
from lorax_shard.sampling.watermark import Watermark

# Eight bytes a field, as rows.h has it. A line's own softmax is that of its own number; ``raw_line``
# is the line of its logits as they are, or -1: logprobs are of what is drawn from.
ROW = np.dtype(
    [
        ("source", "i8"), ("line", "i8"), ("raw_line", "i8"),
        ("temperature", "f8"), ("top_k", "i8"), ("top_p", "f8"), ("typical_p", "f8"), ("min_p", "f8"),
        ("repetition", "f8"), ("frequency", "f8"), ("presence", "f8"),
        ("prompt_ids", "i8"), ("num_prompt", "i8"), ("output_ids", "i8"), ("num_output", "i8"),
        ("edit_ids", "i8"), ("edit_values", "i8"), ("num_edits", "i8"), ("preferred", "i8"),
        ("allowed", "i8"), ("num_allowed", "i8"),
        ("seed", "u8"), ("position", "u8"), ("num_alternatives", "i8"),
    ]
)  # fmt: skip
_MASK_64 = 0xFFFFFFFFFFFFFFFF


class Places(Protocol):
    """Says where kernels find arrays."""

    def place(self, values: NDArray[Any]) -> int:
        """Return the address of an array that is this step's."""

    def place_prompt(self, ids: NDArray[np.int64]) -> int:
        """Return the address of a row's prompt, which stays as it is, and where it is."""


class RowSettings(NamedTuple):
    """What is the same in all steps of a row."""

    params: SamplingParams
    # A line of the table; zero where it depends on the step.
    record: bytes
    has_penalty: bool
    # Whether nothing but its logits and its position is asked for.
    is_plain: bool
    # Whether that is the likeliest token alone, if no step edits or masks its logits.
    takes_likeliest: bool
    # Which warpers it asks for.
    has_top: bool
    has_typical: bool


class KnownSettings:
    """Finds out what follows from a row's parameters once for all of its steps.

    Args:
        most: of so many rows it is known, and of those asked for last.
    """

    def __init__(self, most: int = 2048) -> None:
        # By the id of the parameters, which it keeps alive.
        self._known: dict[int, RowSettings] = {}
        self._most = most

    def __len__(self) -> int:
        return len(self._known)

    def of(self, rows: Sequence[SamplerRow]) -> list[RowSettings]:
        """Return the settings of rows."""
        known = self._known
        settings = [known.get(id(row.params)) or self._learned(row.params) for row in rows]
        if len(known) > self._most:
            self._known = {id(each.params): each for each in settings}
        return settings

    def _learned(self, params: SamplingParams) -> RowSettings:
        self._known[id(params)] = settings = _settings(params)
        return settings


def make_table(
    rows: Sequence[SamplerRow],
    settings: Sequence[RowSettings],
    vocab_size: int,
    watermark: Watermark,
    masks: Masks,
    places: Places,
) -> tuple[NDArray[np.void], int]:
    """Return a line for each row, and how many lines their softmaxes need.

    Little is done for each, since a step may have hundreds.
    """
    table = np.frombuffer(bytearray().join([each.record for each in settings]), dtype=ROW)
    table["source"] = table["line"] = np.arange(len(rows))
    table["num_prompt"] = [row.num_prompt_tokens for row in rows]
    table["position"] = [row.num_tokens for row in rows]
    table["num_output"] = table["position"].astype(np.int64) - table["num_prompt"]
    for index, mask in masks.items():
        table["allowed"][index], table["num_allowed"][index] = places.place(mask), len(mask)
    num_lines = len(rows)
    for index, (row, each) in enumerate(zip(rows, settings, strict=True)):
        if (edits := row.edits) is not None:
            table["edit_ids"][index] = places.place(edits.ids)
            table["edit_values"][index] = places.place(edits.values)
            table["num_edits"][index] = len(edits.ids)
        if each.is_plain:
            continue
        if is_raw(row):
            table["raw_line"][index] = num_lines
            num_lines += 1
        if each.has_penalty:
            ids, num_prompt = row.token_ids, row.num_prompt_tokens
            table["prompt_ids"][index] = places.place_prompt(ids[:num_prompt])
            table["output_ids"][index] = places.place(ids[num_prompt:])
        if row.params.watermark:
            preferred = watermark.packed(int(row.token_ids[-1]), vocab_size)
            table["preferred"][index] = places.place(preferred)
    return table, num_lines


def take_likeliest(
    rows: Sequence[SamplerRow], settings: Sequence[RowSettings], masks: Masks
) -> bool:
    """Return whether each row takes the likeliest token of its logits as they are, and no more."""
    return not masks and all(
        each.takes_likeliest and row.edits is None for row, each in zip(rows, settings, strict=True)
    )


@functools.lru_cache(maxsize=64)
def likeliest_table(num_rows: int) -> NDArray[np.void]:
    """Return the table of rows that take the likeliest token: none has a line."""
    table = np.zeros(num_rows, dtype=ROW)
    table["source"] = np.arange(num_rows)
    table["line"] = table["raw_line"] = -1
    return table


def _settings(params: SamplingParams) -> RowSettings:
    record = np.zeros(1, dtype=ROW)
    record["raw_line"] = -1
    record["temperature"] = 0.0 if is_greedy(params) else params.temperature
    for name in ("top_k", "top_p", "typical_p", "min_p", "num_alternatives"):
        record[name] = getattr(params, name)
    for name in ("repetition", "frequency", "presence"):
        record[name] = getattr(params, f"{name}_penalty")
    record["seed"] = params.seed & _MASK_64
    penalty = has_penalty(params)
    is_plain = not (penalty or params.raw_logprobs or params.watermark)
    return RowSettings(
        params,
        record.tobytes(),
        penalty,
        is_plain=is_plain,
        takes_likeliest=is_plain and is_greedy(params) and not params.num_alternatives,
        has_top=not is_greedy(params) and (params.top_k > 0 or params.top_p < 1.0),
        has_typical=not is_greedy(params) and 0.0 < params.typical_p < 1.0,
    )
