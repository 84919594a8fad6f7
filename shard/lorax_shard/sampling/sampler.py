"""Chooses the next token of each row from its logits.

Order: what ``scores`` adjusts (biases, penalties), then for rows that sample:
temperature, top_k, top_p, typical_p, min_p and a draw. Nothing here depends on which
rows come together: a row's softmax is computed by itself, and sums of probabilities are
those of whole numbers, which have no rounding.

Rows are drawn by a kernel on a CPU, by Triton's on a GPU, by tensor operations on other devices or
where Triton fails, each for all rows at once, and one by one where a CPU has no compiler.
``reference`` says what is drawn.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Protocol

import torch

from lorax_shard.sampling.batched import draw_batch
from lorax_shard.sampling.kernel import DrawKernel
from lorax_shard.sampling.masks import NO_MASKS, Masks, forbid
from lorax_shard.sampling.reference import sample_each
from lorax_shard.sampling.sampled import ALL_MASKED, NO_NUMBERS, Draws, SampledTokens
from lorax_shard.sampling.scores import SamplerRow, adjusted
from lorax_shard.sampling.watermark import Watermark

logger = logging.getLogger(__name__)


class SamplesRows(Protocol):
    """A way to draw."""

    def __call__(
        self,
        logits: torch.Tensor,  # S x V
        rows: Sequence[SamplerRow],
        watermark: Watermark,
        masks: Masks = NO_MASKS,
        /,
    ) -> Draws:
        """Return the next token of each row; none for rows without numbers."""


class Sampler:
    """Chooses tokens for the rows of a step; holds no state of any row.

    Args:
        vocab_size: columns beyond it (a padded head) are never chosen.
        device: where the logits come from.
        watermark: what rows prefer that ask for a watermark.
        method: what draws; None: the best that there is for the device.
    """

    def __init__(
        self,
        vocab_size: int,
        device: torch.device | str = "cpu",
        watermark: Watermark | None = None,
        method: SamplesRows | None = None,
    ) -> None:
        self.vocab_size = vocab_size
        self.device = torch.device(device)
        self._watermark = watermark if watermark is not None else Watermark()
        self._method = method if method is not None else best_method(self.device)

    def with_vocab(self, vocab_size: int) -> Sampler:
        """Return a sampler for rows of another vocabulary, otherwise like this one."""
        return Sampler(vocab_size, self.device, self._watermark, self._method)

    def sample(
        self, logits: torch.Tensor, rows: Sequence[SamplerRow], masks: Masks = NO_MASKS
    ) -> SampledTokens:
        """Return the next token of each row; ``logits`` is S x V float32 and stays as it is.

        Rows with masks draw what these allow.

        Raises ValueError when the shape does not fit the rows or the vocabulary.
        """
        return self.draw(logits, rows, masks).read()

    def draw(
        self, logits: torch.Tensor, rows: Sequence[SamplerRow], masks: Masks = NO_MASKS
    ) -> Draws:
        """Do the same, but do not wait for a device."""
        self._check_shape(logits, len(rows))
        logits = logits[:, : self.vocab_size]
        draws = self._method(logits, rows, self._watermark, masks)
        if isinstance(draws, SampledTokens) and min(draws.ids, default=0) < 0:
            for index, token_id in enumerate(draws.ids):
                if token_id < 0:
                    scores = adjusted(forbid(logits, masks), rows, [index], self._watermark)
                    is_masked = bool(torch.isneginf(scores).all())
                    draws.fail(index, ALL_MASKED if is_masked else NO_NUMBERS)
        return draws

    def _check_shape(self, logits: torch.Tensor, num_rows: int) -> None:
        if logits.dim() != 2 or logits.shape[0] != num_rows or logits.shape[1] < self.vocab_size:
            raise ValueError(
                f"logits have shape {tuple(logits.shape)}; "
                f"expected {num_rows} rows of at least {self.vocab_size} values"
            )


def best_method(device: torch.device) -> SamplesRows:
    """Return what draws fastest from logits on a device; what needs compiling is compiled."""
    if device.type == "cuda":
        return _best_of_gpu(device)
    if device.type != "cpu":
        return draw_batch
    reason = DrawKernel.probe()
    if reason is None:
        return DrawKernel()
    logger.warning("tokens are drawn row by row, which is slow: %s", reason)
    return sample_each


def _best_of_gpu(device: torch.device) -> SamplesRows:
    try:
        from lorax_shard.sampling.triton import trial
        from lorax_shard.sampling.triton.backend import TritonDraws
    except ImportError as error:
        reason: str | None = f"Triton cannot be imported: {error}"
    else:
        method = TritonDraws()
        reason = trial.failure(method, device)
        if reason is None:
            return method
    logger.warning("tokens are drawn by tensor operations, in some hundred launches: %s", reason)
    return draw_batch
