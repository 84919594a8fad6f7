"""From drawn tokens to what clients see: texts, ends, details. Done by rank 0 for all ranks."""

from __future__ import annotations

from lorax_contract.errors import GenerationError
from lorax_contract.step import FinishCode
from lorax_shard.engine.detokenizer import Detokenizer
from lorax_shard.engine.outcome import OutcomeBuilder, TokenTexts
from lorax_shard.engine.rows import Row
from lorax_shard.engine.sampler import SampledTokens


class Emitter:
    """Writes the tokens of rows into the outcome of their step.

    Args:
        detokenizer: the base's.
    """

    def __init__(self, detokenizer: Detokenizer) -> None:
        self.detokenizer = detokenizer

    def emit(
        self, rows: list[Row], sampled: SampledTokens, out: OutcomeBuilder
    ) -> list[FinishCode]:
        """Write one token of each row; return which rows end with it, and how.

        A row of which something fails is written as failed, alone.
        """
        finishes = []
        for index, row in enumerate(rows):
            try:
                finishes.append(self._emit(index, row, sampled, out))
            except Exception as error:  # noqa: BLE001 - it is this row's
                out.outcome.details.pop(row.request_id, None)
                out.fail(row.request_id, error, doing="no token could be made")
                finishes.append(FinishCode.ERROR)
        return finishes

    def _emit(
        self, index: int, row: Row, sampled: SampledTokens, out: OutcomeBuilder
    ) -> FinishCode:
        if (reason := sampled.errors.get(index)) is not None:
            raise GenerationError(reason)
        token_id = sampled.ids[index]
        emitted = row.take_output().push(token_id)
        if emitted.finish != FinishCode.RUNNING:
            out.detail(row.request_id).generated_text = row.take_output().generated_text
        self._add_details(row, sampled.alternatives[index], out)
        out.token(row.request_id, token_id, sampled.logprobs[index], emitted)
        return emitted.finish

    def _add_details(
        self, row: Row, alternatives: tuple[list[int], list[float]] | None, out: OutcomeBuilder
    ) -> None:
        """Add what only some rows have: alternatives, and once the prompt's logprobs."""
        own = row.adapter.reader if row.adapter is not None else None
        texts = TokenTexts(own or self.detokenizer)
        if alternatives is not None:
            out.detail(row.request_id).alternatives.append(texts.alternatives(*alternatives))
        if row.prompt_logprobs is not None:
            prompt_ids = row.token_ids[: row.num_prompt_tokens].tolist()
            detail = out.detail(row.request_id)
            detail.prompt_tokens = texts.columns(prompt_ids, row.prompt_logprobs)
