"""The rows that live in a shard: token ids, block tables, and what was computed of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from lorax_contract.errors import ValidationError
from lorax_contract.step import (
    LogitBias,
    NewRow,
    OutputKind,
    RequestId,
    RequestSpec,
    SamplingParams,
)
from lorax_shard.constraints.masks import NextTokens
from lorax_shard.engine.active_adapters import ActiveAdapter
from lorax_shard.engine.drafts import DraftSource
from lorax_shard.engine.output import RowOutput
from lorax_shard.engine.prompt_scores import PromptScores
from lorax_shard.engine.vectors import PromptVector
from lorax_shard.sampling.scores import LogitEdits, edits_of, has_penalty

IdArray = NDArray[np.int64]

_SPARE_TOKENS = 64
_FIRST_ROWS = 8
# How many steps an ended row is remembered, so that steps planned before its end
# was known pass over it. Far above any plan depth.
_REMEMBERED_STEPS = 64


class UnreadId(NamedTuple):
    """An id among those that one pass drew on a device."""

    ids: torch.Tensor  # int64
    place: int


class Row:
    """One resident request. Owned by a ResidentBatch.

    Who launches steps changes it, but for what is said to be of who collects them.

    ``num_computed`` chases ``num_tokens``: a new prompt, a chunk, a resumed
    request and a decode are all "compute the next n known tokens". A row that
    has computed all its known tokens draws one more, or ends if none is asked for.
    """

    __slots__ = (
        "_edits",
        "_first_edits",
        "_ids",
        "_min_new_tokens",
        "_num_places",
        "_output",
        "adapter",
        "adapter_start",
        "constraint",
        "draws",
        "index",
        "is_ended",
        "make_output",
        "num_blocks",
        "num_computed",
        "num_kv_tokens",
        "num_prompt_tokens",
        "num_tokens",
        "pace",
        "params",
        "prompt_scores",
        "reads_ids",
        "request_id",
        "scores_prompt",
        "second_start",
        "unread",
        "vector",
    )

    def __init__(
        self,
        spec: RequestSpec,
        ids: IdArray,
        *,
        num_computed: int = 0,
        ending_ids: Collection[int] = (),
    ) -> None:
        self.request_id = spec.request_id
        self.num_tokens = len(ids)
        self.num_prompt_tokens = len(spec.prompt_ids)
        self.num_computed = num_computed
        # Its length at the end, without the last token, which is never computed.
        self.num_kv_tokens = spec.num_kv_tokens
        # What proposes its drafts; None: nothing is drafted.
        self.pace: DraftSource | None = None
        self.params = spec.sampling
        # Whether a draw depends on the ids before it.
        self.reads_ids = has_penalty(self.params) or self.params.watermark
        # Whether tokens are drawn; else the row ends with its prompt.
        self.draws = spec.output is OutputKind.TOKENS
        # The token that the second of two texts begins with; 0: there is one.
        self.second_start = spec.second_start
        # What is made of its prompt; None: no vector.
        self.vector = PromptVector.of(spec)
        # What is added to the logits, at first and later: what would end the output is banned
        # as long as it may not.
        self._min_new_tokens = spec.stopping.min_new_tokens
        self._edits = edits_of(spec.sampling.logit_bias)
        self._first_edits = self._edits
        if self._min_new_tokens:
            self._first_edits = edits_of(spec.sampling.logit_bias, ending_ids)
        # Makes the row's text; None: another rank does.
        self.make_output: Callable[[], RowOutput] | None = None
        self._output: RowOutput | None = None
        # None: the base model.
        self.adapter: ActiveAdapter | None = None
        # The position from which on it computes with that, and with the base model before.
        self.adapter_start = 0
        # What its next token may be; None: any, or another rank draws.
        self.constraint: NextTokens | None = None
        # Whether it was told that it ends: what steps in flight still draw of it is nobody's.
        self.is_ended = False
        # The row's line in the batch's table of blocks (-1: it is in no batch), and how much of it is
        # granted.
        self.index = -1
        self.num_blocks = 0
        # Where its last id lies, if that was drawn on a device and not read yet; see ``expect``.
        self.unread: UnreadId | None = None
        # Of prompt tokens 0..k so far; None: not asked, or given in an earlier residence. Belongs to
        # who collects steps, like its text; who launches them knows whether more is asked for.
        self.prompt_scores: PromptScores | None = None
        self.scores_prompt = False
        if self.params.prompt_logprobs and len(ids) == self.num_prompt_tokens:
            # Nothing is known of the first token, nor of those computed by somebody else.
            self.scores_prompt = True
            self.prompt_scores = PromptScores([math.nan] * (num_computed + 1))
            if self.params.num_prompt_alternatives:
                self.prompt_scores.alternatives = [([], [])] * (num_computed + 1)
        self._num_places = len(ids) + _SPARE_TOKENS
        self._ids = np.empty(self._num_places, dtype=np.int64)
        self._ids[: len(ids)] = ids

    @property
    def token_ids(self) -> IdArray:
        """All ids, prompt then output; a view that the next append may outdate.

        Whoever asks sees to it that all are read.
        """
        assert self.unread is None, "the last id is on its way from a device"
        return self._ids[: self.num_tokens]

    @property
    def prompt_ids(self) -> IdArray:
        """The ids of the prompt."""
        return self._ids[: self.num_prompt_tokens]

    @property
    def next_id(self) -> int:
        """The first token that is not computed yet; 0 stands for one that is not read yet."""
        return int(self._ids[self.num_computed])

    @property
    def edits(self) -> LogitEdits | None:
        """What is added to the logits of the next token; None: nothing."""
        return self.edits_behind(0) if self._first_edits is not None else None

    def edits_behind(self, num_ahead: int) -> LogitEdits | None:
        """Return what is added to the logits of the token that comes so many later."""
        num_new = self.num_tokens + num_ahead - self.num_prompt_tokens
        return self._first_edits if num_new < self._min_new_tokens else self._edits

    def ids_with(self, draft: IdArray) -> IdArray:
        """Return all known ids and a draft; a view that the next append outdates."""
        end = self.num_tokens + len(draft)
        self._reserve(end)
        self._ids[self.num_tokens : end] = draft
        return self._ids[:end]

    def take_output(self) -> RowOutput:
        """Return the row's text, made when it is first asked for: whatever fails is this row's."""
        if self._output is None:
            assert self.make_output is not None, "another rank makes this row's text"
            self._output, self.make_output = self.make_output(), None
        return self._output

    def _go_on_scoring(self, before: Row) -> None:
        scores, num = before.prompt_scores, self.num_computed + 1
        if self.prompt_scores is not None and scores is not None:
            # Of a step that failed some passes may have succeeded.
            self.prompt_scores = PromptScores(scores.logprobs[:num], scores.alternatives[:num])

    @property
    def gathers(self) -> bool:
        """Whether it keeps something of each prompt token that is computed."""
        return self.scores_prompt or self.vector is not None

    def go_on_gathering(self, before: Row) -> None:
        """Take over what an earlier row of the same request has of what it computed."""
        self._go_on_scoring(before)
        if self.vector is not None and before.vector is not None:
            self.vector.go_on_from(before.vector)

    def append(self, token_id: int) -> None:
        """Add one sampled id."""
        end = self.num_tokens
        if end == self._num_places:
            self._reserve(end + 1)
        self._ids[end] = token_id
        self.num_tokens = end + 1

    def expect(self, unread: UnreadId) -> None:
        """Add an id that is drawn and not read yet."""
        self.append(0)
        self.unread = unread

    def learn(self, token_id: int) -> None:
        """Take the id that was expected."""
        self._ids[self.num_tokens - 1] = token_id
        self.unread = None

    def _reserve(self, num: int) -> None:
        if num > self._num_places:
            grown = np.empty(2 * num, dtype=np.int64)
            grown[: self.num_tokens] = self._ids[: self.num_tokens]
            self._ids, self._num_places = grown, len(grown)


class DraftedRow:
    """A row as it would be with the first tokens of a draft, for the draw that comes next.

    Used up before the row changes.
    """

    __slots__ = ("_draft", "_num_ahead", "_row")

    # What is bound to a grammar has no drafts.
    constraint: NextTokens | None = None

    def __init__(self, row: Row, draft: IdArray, num_ahead: int) -> None:
        self._row, self._draft, self._num_ahead = row, draft, num_ahead

    @property
    def params(self) -> SamplingParams:
        """The row's."""
        return self._row.params

    @property
    def adapter(self) -> ActiveAdapter | None:
        """The row's."""
        return self._row.adapter

    @property
    def edits(self) -> LogitEdits | None:
        """What is added to the logits there."""
        return self._row.edits_behind(self._num_ahead)

    @property
    def token_ids(self) -> IdArray:
        """All ids up to there."""
        return self._row.ids_with(self._draft)[: self._row.num_tokens + self._num_ahead]

    @property
    def num_prompt_tokens(self) -> int:
        """The row's."""
        return self._row.num_prompt_tokens

    @property
    def num_tokens(self) -> int:
        """How many ids that is."""
        return self._row.num_tokens + self._num_ahead


def make_row(
    new: NewRow, *, vocab_size: int, num_computed: int = 0, eos_token_ids: Collection[int] = ()
) -> Row:
    """Check a new row and build its state; ValidationError says what is wrong with it."""
    spec = new.spec
    ids = _checked_ids(new, vocab_size)
    if not 0 <= num_computed < len(ids):
        raise ValidationError(
            f"{num_computed} of {len(ids)} tokens are called computed; at least one must be left"
        )
    _check_bias(spec.sampling.logit_bias, vocab_size)
    ending_ids = {*eos_token_ids, *spec.stopping.stop_token_ids}
    return Row(
        spec,
        ids,
        num_computed=num_computed,
        ending_ids=[each for each in ending_ids if 0 <= each < vocab_size],
    )


def _check_bias(bias: LogitBias, vocab_size: int) -> None:
    if len(bias.ids) != len(bias.values):
        raise ValidationError(
            f"the logit bias has {len(bias.ids)} ids and {len(bias.values)} values"
        )
    for token_id, value in zip(bias.ids, bias.values, strict=True):
        if not (0 <= token_id < vocab_size and math.isfinite(value)):
            raise ValidationError(
                f"the logit bias of {value} for token id {token_id} is no number, or the id is "
                f"outside the model's vocabulary of {vocab_size}"
            )


def _checked_ids(new: NewRow, vocab_size: int) -> IdArray:
    if not len(new.spec.prompt_ids):
        raise ValidationError("the prompt is empty; send at least one token")
    ids = np.concatenate(
        [np.asarray(part, dtype=np.int64) for part in (new.spec.prompt_ids, new.output_ids)]
    )
    outside = (ids < 0) | (ids >= vocab_size)
    if outside.any():
        raise ValidationError(
            f"token id {ids[outside][0]} is outside the model's vocabulary of {vocab_size}"
        )
    return ids


class ResidentBatch:
    """All resident rows and one table with their blocks, a line per row.

    Every entry of the table is a block of the pool at all times, also beyond what
    a row was granted, so that a slice of the table is padded with valid blocks.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        # Requests that ended, and the step in which they did; oldest first.
        self._ended: dict[RequestId, int] = {}
        self._num_steps = 0
        self.start_anew(num_blocks)

    def start_anew(self, num_blocks: int) -> None:
        """Forget all rows, and have a pool of so many blocks."""
        self.num_blocks = num_blocks
        self.tables: IdArray = np.zeros((_FIRST_ROWS, 16), dtype=np.int64)
        self._rows: dict[RequestId, Row] = {}
        self._free_lines = list(range(_FIRST_ROWS))
        self._ended.clear()

    def start_step(self) -> None:
        """Forget the ends of long ago."""
        self._num_steps += 1
        for request_id, ended_in in list(self._ended.items()):
            if ended_in + _REMEMBERED_STEPS > self._num_steps:
                break
            del self._ended[request_id]

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows.values())

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._rows

    @property
    def rows(self) -> Mapping[RequestId, Row]:
        """The rows by request."""
        return self._rows

    def get(self, request_id: RequestId) -> Row | None:
        """Return the row of a request, or None."""
        return self._rows.get(request_id)

    def add(self, row: Row) -> None:
        """Take a row in; its request must not be resident."""
        if not self._free_lines:
            self._widen(rows=2 * len(self.tables))
        row.index = self._free_lines.pop()
        self._ended.pop(row.request_id, None)
        self._rows[row.request_id] = row

    def end(self, request_id: RequestId) -> None:
        """Let a row go and remember it for the steps that are on their way."""
        self.drop(request_id)
        self._ended[request_id] = self._num_steps

    def has_ended(self, request_id: RequestId) -> bool:
        """Return whether a row ended of late, which the plan at hand may not know yet."""
        return request_id in self._ended

    def drop(self, request_id: RequestId) -> None:
        """Forget a row; unknown requests are no error."""
        self._ended.pop(request_id, None)
        row = self._rows.pop(request_id, None)
        if row is not None:
            self.tables[row.index, : row.num_blocks] = 0
            self._free_lines.append(row.index)
            row.index = -1

    def grant(self, row: Row, blocks: Sequence[int]) -> None:
        """Append blocks to a row's table; ValidationError for a block outside the pool."""
        if min(blocks) < 0 or max(blocks) >= self.num_blocks:
            wrong = next(block for block in blocks if not 0 <= block < self.num_blocks)
            raise ValidationError(f"block {wrong} is outside the pool of {self.num_blocks} blocks")
        end = row.num_blocks + len(blocks)
        if end > self.tables.shape[1]:
            self._widen(width=max(end, 2 * self.tables.shape[1]))
        self.tables[row.index, row.num_blocks : end] = blocks
        row.num_blocks = end

    def blocks_of(self, row: Row) -> list[int]:
        """Return the blocks granted to a row, in order."""
        return [int(block) for block in self.tables[row.index, : row.num_blocks]]

    def _widen(self, *, rows: int | None = None, width: int | None = None) -> None:
        old = self.tables
        self.tables = np.zeros((rows or len(old), width or old.shape[1]), dtype=np.int64)
        self.tables[: len(old), : old.shape[1]] = old
        self._free_lines.extend(range(len(old), len(self.tables)))
