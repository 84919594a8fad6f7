"""Rows for the sampler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorax_contract.step import SamplingParams


@dataclass(frozen=True, slots=True)
class FakeRow:
    """A row as the sampler sees it."""

    params: SamplingParams
    token_ids: NDArray[np.int64]
    num_prompt_tokens: int


def make_row(
    prompt_ids: Sequence[int] = (1, 2, 3), output_ids: Sequence[int] = (), **params: Any
) -> FakeRow:
    """Return a row with these tokens; ``params`` are those of SamplingParams."""
    ids = np.array([*prompt_ids, *output_ids], dtype=np.int64)
    return FakeRow(SamplingParams(**params), ids, len(prompt_ids))
