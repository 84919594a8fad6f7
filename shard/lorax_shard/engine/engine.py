"""The engine: executes one step after another on the resident rows.

One thread at a time may call it; the command queue sees to that. A step is:
rows leave, rows enter, blocks are granted and copied, one ragged forward pass
computes prompt chunks and decodes together, rows that have computed all their
known tokens draw one more.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from lorax_contract.errors import GenerationError, ShardError, ValidationError
from lorax_contract.step import (
    BASE_ADAPTER,
    AdapterHandle,
    BlockId,
    FinishCode,
    NewRow,
    RequestId,
    StepOutcome,
    StepPlan,
    WarmupSpec,
)
from lorax_shard.engine.active_adapters import ActiveAdapter, ActiveAdapters, ReadyAdapters
from lorax_shard.engine.copies import check_copies, make_copies
from lorax_shard.engine.detokenizer import Detokenizer
from lorax_shard.engine.drafter import Drafter
from lorax_shard.engine.emitter import Emitter
from lorax_shard.engine.forward import passes, run_pass
from lorax_shard.engine.inputs import RowWork, StepInputs
from lorax_shard.engine.largest_step import LargestStep
from lorax_shard.engine.memory import MemoryPlan, PoolSettings, explained, size_pool
from lorax_shard.engine.outcome import OutcomeBuilder
from lorax_shard.engine.ranks import (
    broken_by,
    check_same_work,
    least_of,
    missing_somewhere,
    share_draws,
)
from lorax_shard.engine.row_draws import PassDraws, draw
from lorax_shard.engine.row_entry import RowEntry
from lorax_shard.engine.rows import ResidentBatch, Row
from lorax_shard.engine.self_test import self_test
from lorax_shard.model.interface import PagedModel
from lorax_shard.parallel.group import RankGroup
from lorax_shard.sampling.sampler import Sampler
from lorax_shard.sampling.watermark import Watermark

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from lorax_shard.constraints.rows import ConstrainedRows

MakeConstraints: TypeAlias = "Callable[[Detokenizer], ConstrainedRows]"

logger = logging.getLogger(__name__)

# How many steps an ended row is remembered, so that steps planned before its end
# was known pass over it. Far above any plan depth.
_REMEMBERED_STEPS = 64
_BASE_ONLY = "this shard serves the base model only, without adapters"


class Engine:
    """Owns the model, its KV pool and the resident rows of one rank."""

    def __init__(
        self,
        model: PagedModel,
        tokenizer: Tokenizer,
        pool: PoolSettings,
        *,
        adapters: ReadyAdapters | None = None,
        batch_invariant: bool = False,
        group: RankGroup | None = None,
        drafter: Drafter | None = None,
        watermark: Watermark | None = None,
        make_constraints: MakeConstraints | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.memory = MemoryPlan(num_blocks=0, items=(("weights", model.weight_bytes),))
        self.batch = ResidentBatch(0, pool.block_size)
        self._pool = pool
        self._batch_invariant = batch_invariant
        self._group = group
        self._drafter = drafter
        # Rank 0 draws for all, and makes all texts.
        self._sampler: Sampler | None = None
        self._emitter: Emitter | None = None
        self.constraints: ConstrainedRows | None = None
        if group is None or group.rank == 0:
            self._sampler = Sampler(model.vocab_size, model.device, watermark)
            self._emitter = Emitter(Detokenizer(tokenizer))
            if make_constraints is not None:
                self.constraints = make_constraints(self._emitter.detokenizer)
        self._entry = RowEntry(
            model,
            self._emitter.detokenizer if self._emitter is not None else None,
            self.constraints,
            drafter,
        )
        self.adapters: ActiveAdapters | None = None
        if adapters is not None and model.slots is not None:
            self.adapters = ActiveAdapters(
                adapters,
                model.slots,
                vocab_size=model.vocab_size,
                eos_token_ids=model.eos_token_ids,
                read_tokens=self._emitter.detokenizer.with_tokens if self._emitter else None,
            )
        # Requests that ended, and the step in which they did; oldest first.
        self._ended: dict[RequestId, int] = {}
        self._num_steps = 0
        # Blocks in host memory, and the seconds that one takes there or back.
        self.num_host_blocks = 0
        self.block_move_s = 0.0

    @property
    def num_blocks(self) -> int:
        """KV blocks in the pool; 0 before the warm-up."""
        return self.batch.num_blocks

    @property
    def block_size(self) -> int:
        """Tokens per KV block."""
        return self.batch.block_size

    def warm_up(self, spec: WarmupSpec) -> int:
        """Run the largest step once, make the KV pool, and return its number of blocks.

        All rows are dropped. StartupError says that the memory does not suffice.
        """
        self.clear()
        self.batch = ResidentBatch(0, self._pool.block_size)
        if self._drafter is not None:
            self._drafter.limit(spec)
        block_size = self._pool.block_size
        step = LargestStep(
            self.model,
            self._sampler,
            spec,
            block_size=block_size,
            max_blocks=self._pool.num_blocks or spec.max_blocks or None,
            constrained=self.constraints is not None,
        )
        self.memory = size_pool(self.model, self._pool, spec, step.run)
        num_blocks = self.memory.num_blocks
        if self._group is not None:
            num_blocks = least_of(self._group, num_blocks)
        with explained(
            f"a KV cache of {num_blocks} blocks cannot be had; "
            "lower --num-blocks or --kv-memory-fraction"
        ):
            self.model.allocate_cache(num_blocks, block_size)
        self._allocate_swap_space()
        self.batch = ResidentBatch(num_blocks, block_size)
        return num_blocks

    def _allocate_swap_space(self) -> None:
        """Make host memory for blocks, as many on each rank; their sizes may differ."""
        num_blocks = self._pool.swap_bytes // self.model.block_bytes(self._pool.block_size)
        if self._group is not None and self._pool.swap_bytes:
            num_blocks = least_of(self._group, num_blocks)
        with explained(f"{num_blocks} host blocks cannot be had; lower --swap-space"):
            self.block_move_s = self.model.allocate_swap_space(num_blocks)
        self.num_host_blocks = num_blocks

    def clear(self) -> None:
        """Drop all rows."""
        self.drop([row.request_id for row in self.batch])
        self._ended.clear()

    def drop(self, request_ids: list[RequestId]) -> None:
        """Drop rows; those that are not here are no error."""
        for request_id in request_ids:
            self.batch.drop(request_id)
            self._ended.pop(request_id, None)

    def admit(self, new: NewRow, *, num_computed: int = 0) -> Row:
        """Take a row in, of which ``num_computed`` tokens are in the cache already.

        ValidationError says what is wrong with the row.
        """
        request_id = new.spec.request_id
        if request_id in self.batch:
            raise ValidationError(f"request {request_id} is resident already; drop it first")
        row = self._entry.row_of(new, self._adapter(new.spec.adapter), num_computed)
        self._ended.pop(request_id, None)
        self.batch.add(row)
        return row

    def has_own_tokens(self, handle: AdapterHandle) -> bool:
        """Return whether an adapter in effect comes with a tokenizer of its own."""
        adapter = self._adapter(handle)
        return adapter is not None and adapter.has_own_tokens

    def _adapter(self, handle: AdapterHandle) -> ActiveAdapter | None:
        if handle == BASE_ADAPTER:
            return None
        if self.adapters is None:
            raise ValidationError(_BASE_ONLY)
        return self.adapters[handle]

    def _change_adapters(self, plan: StepPlan, out: OutcomeBuilder) -> None:
        """Let adapters cease and take effect; rows that need one that does not end alone."""
        if self.adapters is None:
            out.outcome.inactive.update(dict.fromkeys(plan.activate, _BASE_ONLY))
            return
        for handle in plan.deactivate:
            self.cease(handle)
        if plan.activate:
            group = self._group
            missing = partial(missing_somewhere, group, plan.activate) if group else None
            out.outcome.inactive = self.adapters.change(plan.activate, missing)

    def cease(self, handle: AdapterHandle) -> None:
        """Let an adapter cease between steps; rows that still use it are dropped."""
        assert self.adapters is not None
        for row in [row for row in self.batch if row.adapter and row.adapter.handle == handle]:
            logger.error("adapter %d ceases while request %d uses it", handle, row.request_id)
            self.batch.drop(row.request_id)
        self.adapters.deactivate(handle)

    def step(self, plan: StepPlan) -> StepOutcome:
        """Execute a plan. Bad rows end alone; ShardError refuses a plan that is no plan."""
        started = time.perf_counter_ns()
        self._check(plan)
        out = OutcomeBuilder(plan.seq)
        self._start_step()
        self.drop(plan.drop)
        self._change_adapters(plan, out)
        for new in plan.new_rows:
            self._admit(new, out)
        work = self._take_work(plan, out)
        if self._group is not None:
            check_same_work(self._group, plan.seq, work)
        make_copies(self.model, plan.copies)
        forward_started = time.perf_counter_ns()
        self._compute(work, out)
        ended = time.perf_counter_ns()
        out.outcome.forward_ns = ended - forward_started
        out.outcome.total_ns = ended - started
        return out.outcome

    def _start_step(self) -> None:
        self._num_steps += 1
        for request_id, ended_in in list(self._ended.items()):
            if ended_in + _REMEMBERED_STEPS > self._num_steps:
                break
            del self._ended[request_id]

    def _check(self, plan: StepPlan) -> None:
        """Refuse what no single row is to blame for, before anything changes."""
        if not self.num_blocks:
            raise ShardError("there is no KV pool yet; call Warmup before the first step")
        lengths = {len(plan.row_ids), len(plan.num_tokens), len(plan.num_new_blocks)}
        if len(lengths) != 1 or sum(plan.num_new_blocks) != len(plan.new_blocks):
            raise ShardError(f"step {plan.seq}: its columns differ in length")
        check_copies(plan.seq, plan.copies, self.num_blocks, self.num_host_blocks)

    def _admit(self, new: NewRow, out: OutcomeBuilder) -> None:
        try:
            self.admit(new, num_computed=new.num_cached)
        except Exception as error:  # noqa: BLE001 - it is this row's
            self._fail(new.spec.request_id, error, out, doing="the request was not taken in")

    def _take_work(self, plan: StepPlan, out: OutcomeBuilder) -> list[RowWork]:
        """Grant the plan's blocks and return what its rows compute, single tokens first."""
        single: list[RowWork] = []
        chunks: list[RowWork] = []
        seen: set[RequestId] = set()
        granted = 0
        columns = zip(plan.row_ids, plan.num_tokens, plan.num_new_blocks, strict=True)
        for request_id, num_tokens, num_new in columns:
            blocks = plan.new_blocks[granted : granted + num_new]
            granted += num_new
            row = self.batch.get(request_id)
            if row is None and request_id in self._ended:
                continue
            try:
                if row is None:
                    raise GenerationError(f"request {request_id} is not resident in this shard")
                if request_id in seen:
                    raise GenerationError("the step names the row twice")
                seen.add(request_id)
                if blocks:
                    self.batch.grant(row, blocks)
                self._check_work(row, num_tokens)
            except Exception as error:  # noqa: BLE001 - it is this row's
                self._fail(request_id, error, out, doing="the row's part of the step is wrong")
                continue
            if num_tokens:
                (single if num_tokens == 1 else chunks).append(RowWork(row, num_tokens))
        work = [*single, *chunks]
        work = [item for item in work if item.row.request_id in self.batch]
        return work if self._drafter is None else self._drafter.added_to(work, self.block_size)

    def _check_work(self, row: Row, num_tokens: int) -> None:
        end = row.num_computed + num_tokens
        if end > row.num_tokens:
            raise GenerationError(
                f"asks to compute tokens up to {end}, but only {row.num_tokens} are known"
            )
        if end > row.num_blocks * self.block_size:
            raise GenerationError(
                f"tokens up to {end} need more than the {row.num_blocks} blocks "
                f"of {self.block_size} that the row was granted"
            )

    def _compute(self, work: list[RowWork], out: OutcomeBuilder) -> None:
        if not self._batch_invariant:
            for part in passes(work, self.batch):
                self._compute_group(part, out)
            return
        for item in work:
            self._compute_alone(item, out)

    def _compute_alone(self, item: RowWork, out: OutcomeBuilder) -> None:
        """Compute a row token by token; of a draft those that were drawn."""
        row = item.row
        for _ in range(item.num_tokens):
            if row.request_id in self.batch:
                self._compute_group([RowWork(row, 1)], out)
        num_kept = 0
        for token_id in item.draft:
            if row.request_id not in self.batch or row.token_ids[-1] != token_id:
                break
            num_kept += 1
            self._compute_group([RowWork(row, 1)], out)
        self._note_draft(item, num_kept, out)

    def _compute_group(self, work: list[RowWork], out: OutcomeBuilder) -> None:
        """Compute rows in one forward pass; if it raises, in halves, so that the culprit is alone.

        DeviceBrokenError when there is none: then nothing can be computed any more.
        KV writes are the same each time, and no row changes before all of its group
        succeeded, so that a repeated pass gives the same tokens.
        """
        if not work:
            return
        try:
            result = run_pass(self.model, self.batch, work)
            draws = None if self._sampler is None else draw(self._sampler, result)
        except Exception as error:
            if self._group is not None:
                # The others are in the middle of it; halves would be this rank's alone.
                raise broken_by(self._group, error) from error
            spare = self.batch.blocks_of(work[0].row)[-1]
            self._note_failure(work, error, out)
        else:
            self._advance(work, result.inputs, draws)
            self._book(result.inputs.drawing, draws, out)
            self._book_ended(result.inputs.ended, out)
            return
        # Outside the handler: its exception holds the failed pass's tensors alive.
        if len(work) == 1:
            # Its last block is its own, and it needs that no more.
            self_test(self.model, BlockId(spare), self.num_blocks, self.block_size)
            return
        middle = len(work) // 2
        self._compute_group(work[:middle], out)
        self._compute_group(work[middle:], out)

    def _note_failure(self, work: list[RowWork], error: Exception, out: OutcomeBuilder) -> None:
        """End a row whose pass failed though it was alone; of several it may be any."""
        first = work[0].row.request_id
        if len(work) == 1:
            logger.error("request %d: the forward pass failed", first, exc_info=error)
            self._fail(first, error, out, doing="the forward pass failed for this request")
        else:
            name = type(error).__name__
            logger.warning("a forward pass of %d rows failed (%s); trying halves", len(work), name)

    def _advance(self, work: list[RowWork], inputs: StepInputs, draws: PassDraws | None) -> None:
        for item in work:
            item.row.num_computed += item.num_tokens
        if draws is None:
            return
        for span, scores in zip(inputs.prompt_spans, draws.prompts, strict=True):
            if span.row.prompt_scores is not None:
                span.row.prompt_scores.extend(scores)

    def _book(self, drawing: list[RowWork], draws: PassDraws | None, out: OutcomeBuilder) -> None:
        """Append the drawn tokens that are kept to their rows and let go of those that ended.

        Rank 0 says what was drawn and who ends; its outcome alone tells clients.
        """
        if not drawing:
            return
        ids = [0] * sum(1 + len(item.draft) for item in drawing)
        kept, finishes = [0] * len(drawing), [FinishCode.RUNNING] * len(drawing)
        if self._emitter is not None and draws is not None and draws.sampled is not None:
            ids = draws.sampled.ids
            kept, finishes = self._emitter.emit(drawing, draws.sampled, out)
        if self._group is not None:
            ids, kept, finishes = share_draws(self._group, ids, kept, finishes)
        self._accept(drawing, ids, finishes)
        start = 0
        for item, num_kept, finish in zip(drawing, kept, finishes, strict=True):
            row = item.row
            # Given with the first token.
            row.prompt_scores = None
            for token_id in ids[start : start + num_kept]:
                row.append(token_id)
                if draws is None:
                    out.told(row.request_id, token_id)
            start += 1 + len(item.draft)
            row.num_computed += max(num_kept - 1, 0)
            self._note_draft(item, num_kept - 1, out)
            if finish != FinishCode.RUNNING:
                if draws is None:
                    out.ends(row.request_id, finish)
                self._end(row.request_id)

    def _note_draft(self, item: RowWork, num_kept: int, out: OutcomeBuilder) -> None:
        if item.row.pace is not None and len(item.draft):
            item.row.pace.checked(len(item.draft), num_kept)
            out.outcome.num_drafted += len(item.draft)

    def _book_ended(self, rows: list[Row], out: OutcomeBuilder) -> None:
        """Let go of the rows of which no token is asked; that they end now, all ranks know."""
        for row in rows:
            if self._emitter is not None:
                self._emitter.end(row, out)
            else:
                out.end(row.request_id)
            self._end(row.request_id)

    def _accept(self, drawing: list[RowWork], ids: list[int], finishes: list[FinishCode]) -> None:
        """Let constraints of rows that go on take their tokens, beside the steps."""
        bound, start = [], 0
        for item, finish in zip(drawing, finishes, strict=True):
            if item.row.constraint is not None and finish == FinishCode.RUNNING:
                bound.append((item.row.constraint, ids[start]))
            start += 1 + len(item.draft)
        if bound and self.constraints is not None:
            self.constraints.advance(*zip(*bound, strict=True))

    def _fail(
        self, request_id: RequestId, error: Exception, out: OutcomeBuilder, *, doing: str
    ) -> None:
        out.fail(request_id, error, doing=doing)
        self._end(request_id)

    def _end(self, request_id: RequestId) -> None:
        """Let a row go and remember it for the steps that are on their way."""
        self.batch.drop(request_id)
        self._ended.pop(request_id, None)
        self._ended[request_id] = self._num_steps
