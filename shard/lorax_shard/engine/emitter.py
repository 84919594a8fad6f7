"""From drawn tokens to what clients see: texts, ends, details. Done by rank 0 for all ranks."""

from __future__ import annotations

from lorax_contract.errors import GenerationError, NoNumbersError
from lorax_contract.step import FinishCode, RequestId
from lorax_shard.engine.detokenizer import Detokenizer
from lorax_shard.engine.drafts import NO_DRAFT
from lorax_shard.engine.inputs import RowWork
from lorax_shard.engine.outcome import OutcomeBuilder, TokenTexts
from lorax_shard.engine.rows import Row
from lorax_shard.engine.vectors import Projection
from lorax_shard.sampling.sampled import NO_NUMBERS, SampledTokens


class Emitter:
    """Writes the tokens of rows into the outcome of their step.

    Args:
        detokenizer: the base's.
    """

    def __init__(self, detokenizer: Detokenizer, projection: Projection | None = None) -> None:
        self.detokenizer = detokenizer
        self._projection = projection

    def emit(
        self, drawing: list[RowWork], sampled: SampledTokens, out: OutcomeBuilder
    ) -> tuple[list[int], list[FinishCode]]:
        """Write the tokens of each row that are kept; return how many, and which rows end and how.

        Kept is what was drawn up to the end of the row, or up to the first draw that is not the
        draft's. A row of which something fails is written as failed, alone.
        """
        kept, finishes = [1] * len(drawing), [FinishCode.RUNNING] * len(drawing)
        # Of rows one after the other whose token is plain, the columns grow at once.
        plain_rows: list[RequestId] = []
        texts: list[str] = []
        start = 0
        for number, item in enumerate(drawing):
            if (text := _plain_text(start, item, sampled)) is not None:
                plain_rows.append(item.row.request_id)
                texts.append(text)
                start += 1
                continue
            _add_plain(plain_rows, texts, start, sampled, out)
            kept[number], finishes[number] = self._emit_row(start, item, sampled, out)
            start += 1 + len(item.draft)
        _add_plain(plain_rows, texts, start, sampled, out)
        return kept, finishes

    def _emit_row(
        self, start: int, item: RowWork, sampled: SampledTokens, out: OutcomeBuilder
    ) -> tuple[int, FinishCode]:
        row, drafted = item.row, item.draft.tolist()
        if row.is_ended:
            return 0, FinishCode.RUNNING
        for num_kept in range(1 + len(drafted)):
            index = start + num_kept
            try:
                finish = self._emit(index, row, sampled, out)
            except Exception as error:  # noqa: BLE001 - it is this row's
                out.outcome.details.pop(row.request_id, None)
                out.fail(row.request_id, error, doing="no token could be made")
                return num_kept, FinishCode.ERROR
            is_last = num_kept == len(drafted)
            if finish != FinishCode.RUNNING or is_last or sampled.ids[index] != drafted[num_kept]:
                break
        return num_kept + 1, finish

    def _emit(
        self, index: int, row: Row, sampled: SampledTokens, out: OutcomeBuilder
    ) -> FinishCode:
        if (reason := sampled.errors.get(index)) is not None:
            raise (NoNumbersError if reason == NO_NUMBERS else GenerationError)(reason)
        token_id = sampled.ids[index]
        emitted = row.take_output().push(token_id)
        if emitted.finish != FinishCode.RUNNING:
            out.detail(row.request_id).generated_text = row.take_output().generated_text
        if (alternatives := sampled.alternatives[index]) is not None:
            detail = out.detail(row.request_id)
            detail.alternatives.append(self._texts(row).alternatives(*alternatives))
        self._add_prompt(row, out)
        out.token(row.request_id, token_id, sampled.logprobs[index], emitted)
        return emitted.finish

    def end(self, row: Row, out: OutcomeBuilder) -> None:
        """Write the end of a row of which no token is asked."""
        try:
            self._add_prompt(row, out)
            if row.vector is not None:
                vector = row.vector.read(row.num_prompt_tokens, self._projection)
                out.detail(row.request_id).vector = vector
        except Exception as error:  # noqa: BLE001 - it is this row's
            out.outcome.details.pop(row.request_id, None)
            out.fail(row.request_id, error, doing="the prompt could not be shown")
            return
        out.detail(row.request_id).generated_text = ""
        out.end(row.request_id)

    def _add_prompt(self, row: Row, out: OutcomeBuilder) -> None:
        """Add, once, what the row reports of its prompt."""
        scores = row.prompt_scores
        if scores is None:
            return
        texts, detail = self._texts(row), out.detail(row.request_id)
        prompt_ids = row.prompt_ids.tolist()
        detail.prompt_tokens = texts.columns(prompt_ids, scores.logprobs)
        detail.prompt_alternatives = [texts.alternatives(*each) for each in scores.alternatives]

    def _texts(self, row: Row) -> TokenTexts:
        own = row.adapter.reader if row.adapter is not None else None
        return TokenTexts(own or self.detokenizer)


def _plain_text(index: int, item: RowWork, sampled: SampledTokens) -> str | None:
    """Take the token of a row that is plain text and the row's only one; None: nothing is taken."""
    row = item.row
    if (
        row.is_ended
        or item.draft is not NO_DRAFT
        or row.prompt_scores is not None
        or sampled.alternatives[index] is not None
        or index in sampled.errors
    ):
        return None
    try:
        return row.take_output().push_plain(sampled.ids[index])
    except Exception:  # noqa: BLE001 - it is said where the row is written by itself
        return None


def _add_plain(
    rows: list[RequestId], texts: list[str], end: int, sampled: SampledTokens, out: OutcomeBuilder
) -> None:
    """Write the tokens before ``end`` that are plain, and begin anew."""
    start = end - len(rows)
    out.plain(rows, sampled.ids[start:end], sampled.logprobs[start:end], texts)
    rows.clear()
    texts.clear()
