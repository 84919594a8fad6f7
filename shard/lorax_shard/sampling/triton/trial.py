"""Compiles the kernels, and tries them beside the specification before rows are given to them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from lorax_contract.step import LogitBias, SamplingParams
from lorax_shard.sampling.batched import draw_batch
from lorax_shard.sampling.scores import LogitEdits, edits_of
from lorax_shard.sampling.triton.backend import TritonDraws
from lorax_shard.sampling.watermark import Watermark

_PENALTIES = {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": -0.7}
_SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.7},
    {"top_k": 30},
    {"top_p": 0.9},
    {"typical_p": 0.8},
    {"min_p": 0.05},
    {"watermark": True, "logit_bias": LogitBias((3, 1), (2.0, -100.0)), **_PENALTIES},
    {"temperature": 1.5, "top_k": 900, "top_p": 0.95, "typical_p": 0.9, "min_p": 0.01,
     "num_alternatives": 5, **_PENALTIES},
    {"temperature": 0.0, "num_alternatives": 3, "raw_logprobs": True, **_PENALTIES},
)  # fmt: skip
# Rows of the one begin at multiples of 16 bytes, those of the other do not: kernels differ by that.
_VOCAB_SIZES = (5000, 5001)


class TrialRow(NamedTuple):
    """A row to try."""

    params: SamplingParams
    token_ids: NDArray[np.int64]
    num_prompt_tokens: int
    num_tokens: int

    @property
    def edits(self) -> LogitEdits | None:
        """Its bias."""
        return edits_of(self.params.logit_bias)


def failure(method: TritonDraws, device: torch.device) -> str | None:
    """Return in words what the kernels do wrong on a device, or None."""
    try:
        for logits, rows in batches(device):
            found = method(logits, rows, Watermark()).read()
            expected = draw_batch(logits, rows, Watermark()).read()
            wrong = sum(a != b for a, b in zip(found.ids, expected.ids, strict=True))
            if wrong:
                return f"its kernels draw {wrong} of {len(rows)} tokens otherwise"
    except Exception as error:  # noqa: BLE001 - what a compiler or a driver raises is not known
        lines = str(error).strip().splitlines()
        return f"its kernels fail ({type(error).__name__}: {lines[0] if lines else 'no words'})"
    return None


def batches(device: torch.device) -> Iterator[tuple[torch.Tensor, list[TrialRow]]]:
    """Yield logits with rows that ask for everything; to draw them compiles all there is."""
    for vocab_size in _VOCAB_SIZES:
        generator = torch.Generator().manual_seed(vocab_size)
        logits = 3 * torch.randn(len(_SETTINGS), vocab_size, generator=generator)
        yield logits.to(device), [_row(number) for number in range(len(_SETTINGS))]


def _row(number: int) -> TrialRow:
    ids = np.arange(number, 40, 3) % 11
    params = SamplingParams(do_sample=True, seed=number, **_SETTINGS[number])
    return TrialRow(params, ids, len(ids) // 2, len(ids))
