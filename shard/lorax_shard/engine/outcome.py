"""Collects what the rows of one step produced, as columns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorax_contract.errors import GenerationError, LoraxError, NoNumbersError
from lorax_contract.step import (
    NO_NUMBERS_CODE,
    Alternatives,
    FinishCode,
    RequestId,
    RowDetail,
    StepOutcome,
    TokenColumns,
)
from lorax_shard.engine.detokenizer import TokenReader, text_of

if TYPE_CHECKING:
    from lorax_shard.engine.output import Emitted


class TokenTexts:
    """The text and the special flag of single tokens, as a client is shown them."""

    def __init__(self, reader: TokenReader) -> None:
        self._reader = reader

    def texts(self, ids: list[int]) -> list[str]:
        """Return the text of each token, as it stands after others."""
        return [text_of(self._reader, token_id) for token_id in ids]

    def columns(self, ids: list[int], logprobs: list[float]) -> TokenColumns:
        """Return tokens with their logprobs as columns."""
        special = [self._reader.is_special(token_id) for token_id in ids]
        return TokenColumns(ids=ids, logprobs=logprobs, texts=self.texts(ids), special=special)

    def alternatives(self, ids: list[int], logprobs: list[float]) -> Alternatives:
        """Return the likeliest tokens of one position, best first."""
        return Alternatives(ids=ids, logprobs=logprobs, texts=self.texts(ids))


class OutcomeBuilder:
    """The outcome of one step while it is made."""

    def __init__(self, seq: int) -> None:
        self.outcome = StepOutcome(seq=seq)

    def token(self, request_id: RequestId, token_id: int, logprob: float, emitted: Emitted) -> None:
        """Add one new token of a row."""
        outcome = self.outcome
        tokens = outcome.tokens
        tokens.ids.append(token_id)
        tokens.logprobs.append(logprob)
        tokens.texts.append(emitted.text)
        tokens.special.append(emitted.special)
        self._count(request_id, 1, emitted.finish)

    def plain(
        self,
        request_ids: list[RequestId],
        ids: list[int],
        logprobs: list[float],
        texts: list[str],
    ) -> None:
        """Add one new token of each of several rows that go on, none of which is special."""
        if not request_ids:
            return
        outcome, num_rows = self.outcome, len(request_ids)
        tokens = outcome.tokens
        tokens.ids += ids
        tokens.logprobs += logprobs
        tokens.texts += texts
        tokens.special += [False] * num_rows
        self._count(request_ids[0], 1, FinishCode.RUNNING)
        outcome.row_ids += request_ids[1:]
        outcome.num_tokens += [1] * (num_rows - 1)
        outcome.finish += [FinishCode.RUNNING] * (num_rows - 1)

    def _count(self, request_id: RequestId, num_tokens: int, finish: FinishCode) -> None:
        """Book tokens of a row behind those of the same row."""
        outcome = self.outcome
        if outcome.row_ids and outcome.row_ids[-1] == request_id:
            outcome.num_tokens[-1] += num_tokens
            outcome.finish[-1] = finish
            return
        outcome.row_ids.append(request_id)
        outcome.num_tokens.append(num_tokens)
        outcome.finish.append(finish)

    def told(self, request_id: RequestId, ids: list[int], finish: FinishCode) -> None:
        """Add what another rank told of a row; its text is there."""
        self.outcome.tokens.ids += ids
        self._count(request_id, len(ids), finish)

    def end(self, request_id: RequestId) -> None:
        """End a row of which no token is asked."""
        self._count(request_id, 0, FinishCode.LENGTH)

    def fail(self, request_id: RequestId, error: Exception, *, doing: str) -> None:
        """End a row with an error of its own; ``doing`` says what was going on."""
        text = _words(error)
        kind = error.kind if isinstance(error, LoraxError) else GenerationError.kind
        detail = self.detail(request_id)
        is_of_numbers = isinstance(error, NoNumbersError)
        detail.error_code = NO_NUMBERS_CODE if is_of_numbers else kind.error_type
        detail.error_text = f"{doing}: {text}"
        self._count(request_id, 0, FinishCode.ERROR)

    def fail_together(self, request_ids: list[RequestId], error: Exception) -> None:
        """Nothing of some rows was computed, since a pass failed that all of them were in."""
        self.outcome.failed += request_ids
        self.outcome.failure = _words(error)

    def detail(self, request_id: RequestId) -> RowDetail:
        """Return the detail of a row, made when it has none."""
        return self.outcome.details.setdefault(request_id, RowDetail())


def _words(error: Exception) -> str:
    return str(error) if isinstance(error, LoraxError) else f"{type(error).__name__}: {error}"
