"""The largest step that a warm-up names, run for the memory that it takes."""

from __future__ import annotations

from dataclasses import replace

from lorax_contract.pooling import Pooling
from lorax_contract.step import (
    AdapterHandle,
    BlockId,
    LogitBias,
    NewRow,
    OutputKind,
    RequestId,
    RequestSpec,
    SamplingParams,
    StoppingParams,
    WarmupSpec,
)
from lorax_shard.constraints.masks import AnyToken
from lorax_shard.device_memory import measure_peak
from lorax_shard.engine.active_adapters import ActiveAdapter
from lorax_shard.engine.forward import MAX_PROMPT_LOGITS, run_pass
from lorax_shard.engine.inputs import RowWork
from lorax_shard.engine.row_draws import draw
from lorax_shard.engine.rows import ResidentBatch, Row, make_row
from lorax_shard.model.interface import PagedModel
from lorax_shard.sampling.sampler import Sampler

# Cached tokens that the single-token rows read together: attention backends that gather
# them do it in pieces, which are no larger than this.
_DECODE_CONTEXT = 32768
_FEW_ROWS, _FEW_TOKENS = 3, 16
# All that makes drawing hold more at once; logprobs of its own need a second softmax.
_SAMPLING = SamplingParams(
    do_sample=True, temperature=0.9, top_k=50, top_p=0.9, typical_p=0.9, min_p=0.01,
    repetition_penalty=1.1, frequency_penalty=0.1, logit_bias=LogitBias((0,), (1.0,)),
    watermark=True, num_alternatives=5, raw_logprobs=True,
)  # fmt: skip


class LargestStep:
    """Rows of a spec: as many as allowed, the last ones with all tokens that are left.

    Those of an encoder are whole, and those of a model that draws no tokens make vectors.
    All rows share the blocks of one, so that the cache for them stays small; what they
    write does not matter. Where adapters are loaded, each row computes with one of them, and
    with another one than its neighbours do.
    """

    def __init__(
        self, model: PagedModel, sampler: Sampler | None, spec: WarmupSpec, *,
        block_size: int, max_blocks: int | None, constrained: bool = False,
    ) -> None:  # fmt: skip
        self._model = model
        # None: another rank draws.
        self._sampler = sampler
        # Masks of outputs that are bound to grammars copy the logits once more where no kernel draws.
        self._constraint = AnyToken(model.vocab_size) if constrained else None
        self._block_size = block_size
        # A resumed request computes its output again; only the last token is never computed.
        longest = max(spec.max_input_length, spec.max_total_tokens - 1, 1)
        self._longest = min(longest, block_size * max_blocks) if max_blocks else longest
        self._lengths = _row_lengths(spec, self._longest)

    def run(self) -> int:
        """Compute it; return how many bytes it took beside the cache.

        Prompts are at the end of the longest sequence.
        """
        num_blocks = -(-self._longest // self._block_size)
        self._model.allocate_cache(num_blocks, self._block_size)
        return measure_peak(self._model.device, lambda: self._compute(num_blocks))

    def _compute(self, num_blocks: int) -> None:
        single = self._lengths.count(1)
        decode_context = min(self._longest, max(1, _DECODE_CONTEXT // max(1, single)))
        batch = ResidentBatch(num_blocks, self._block_size)
        adapters = self._adapters()
        work: list[RowWork] = []
        num_logits = MAX_PROMPT_LOGITS
        for number, length in enumerate(self._lengths):
            context = decode_context if length == 1 else self._longest
            if self._model.is_encoder:
                context = length
            asked = min(num_logits, length - 1)
            num_logits -= asked
            row = self._row(number, context, length, asked)
            row.constraint = self._constraint
            if adapters:
                row.adapter = adapters[number % len(adapters)]
            batch.add(row)
            batch.grant(row, [BlockId(block) for block in range(num_blocks)])
            work.append(RowWork(row, length))
        result = run_pass(self._model, batch, work)
        if self._sampler is not None and self._model.generates:
            draw(self._sampler, result)

    def _row(self, number: int, context: int, length: int, asked: int) -> Row:
        """Return a row that computes the last ``length`` of its ``context`` tokens.

        ``asked``: of how many of them it wants the logprobs.
        """
        start = context - length
        if not self._model.generates:
            new, vocab_size = _vector_row(number, context), self._model.vocab_size
            return make_row(new, vocab_size=vocab_size, num_computed=start)
        row = make_row(
            _new_row(number, num_prompt=start + asked + 1, num_tokens=context),
            vocab_size=self._model.vocab_size,
            num_computed=start,
        )
        # Also where "output" follows, which only makes the logits no more than a pass has.
        row.scores_prompt = True
        return row

    def _adapters(self) -> list[ActiveAdapter]:
        slots = self._model.slots
        loaded = [] if slots is None else sorted(slots.slots)
        return [
            ActiveAdapter(AdapterHandle(slot), slot, self._model.vocab_size, frozenset())
            for slot in loaded
        ]


def few_of(spec: WarmupSpec) -> WarmupSpec:
    """Return the spec of a step that does all that the largest one does, with few rows and tokens."""
    return replace(
        spec,
        max_rows=min(spec.max_rows, _FEW_ROWS),
        max_step_tokens=min(spec.max_step_tokens, _FEW_TOKENS),
    )


def _row_lengths(spec: WarmupSpec, longest: int) -> list[int]:
    """Return how many tokens each row computes, single tokens first."""
    num_rows = max(1, min(spec.max_rows, spec.max_step_tokens))
    left = spec.max_step_tokens - num_rows
    lengths = []
    for _ in range(num_rows):
        more = max(0, min(left, longest - 1))
        lengths.append(1 + more)
        left -= more
    return lengths[::-1]


def _vector_row(number: int, num_tokens: int) -> NewRow:
    spec = RequestSpec(
        request_id=RequestId(number),
        prompt_ids=[0] * num_tokens,
        sampling=SamplingParams(),
        stopping=StoppingParams(max_new_tokens=0),
        output=OutputKind.VECTOR,
        pooling=Pooling.MEAN,
    )
    return NewRow(spec, ())


def _new_row(number: int, *, num_prompt: int, num_tokens: int) -> NewRow:
    spec = RequestSpec(
        request_id=RequestId(number),
        prompt_ids=[0] * num_prompt,
        sampling=_SAMPLING,
        stopping=StoppingParams(max_new_tokens=num_tokens + 1),
    )
    return NewRow(spec, [0] * (num_tokens - num_prompt))
