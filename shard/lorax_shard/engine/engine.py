"""The engine: executes one step after another on the resident rows.

One thread at a time may call it, and one more ``collect``; the command queue sees to that. A
step is: rows leave, rows enter, blocks are granted and copied, one ragged forward pass
computes prompt chunks and decodes together, rows that have computed all their
known tokens draw one more. What clients see of these is made while the next step computes.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from lorax_contract.errors import GenerationError, ShardError, ValidationError
from lorax_contract.step import (
    BASE_ADAPTER,
    AdapterHandle,
    FinishCode,
    NewRow,
    RequestId,
    StepOutcome,
    StepPlan,
    WarmupSpec,
)
from lorax_shard.engine.active_adapters import ActiveAdapter, ActiveAdapters, ReadyAdapters
from lorax_shard.engine.collector import Collector
from lorax_shard.engine.computation import Computation
from lorax_shard.engine.copies import check_copies, make_copies
from lorax_shard.engine.detokenizer import Detokenizer
from lorax_shard.engine.drafter import Drafter
from lorax_shard.engine.emitter import Emitter
from lorax_shard.engine.graph_limits import GraphLimits
from lorax_shard.engine.inputs import RowWork
from lorax_shard.engine.largest_step import LargestStep, few_of
from lorax_shard.engine.launched import LaunchedStep
from lorax_shard.engine.memory import MemoryPlan, PoolSettings, explained, size_pool
from lorax_shard.engine.outcome import OutcomeBuilder
from lorax_shard.engine.pass_prices import PassTimer
from lorax_shard.engine.ranks import (
    least_of,
    missing_somewhere,
    share_ends,
)
from lorax_shard.engine.remembered_peak import RememberedPeak
from lorax_shard.engine.row_entry import RowEntry
from lorax_shard.engine.rows import ResidentBatch, Row
from lorax_shard.engine.same_rows import RowComparison
from lorax_shard.engine.vectors import Projection
from lorax_shard.model.interface import PagedModel
from lorax_shard.parallel.group import GroupBrokenError, RankGroup
from lorax_shard.sampling.sampler import Sampler
from lorax_shard.sampling.watermark import Watermark

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from lorax_shard.constraints.rows import ConstrainedRows

MakeConstraints: TypeAlias = "Callable[[Detokenizer], ConstrainedRows]"

logger = logging.getLogger(__name__)

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
        graphs: GraphLimits | None = None,
        remembered: RememberedPeak | None = None,
        projection: Projection | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.memory = MemoryPlan(num_blocks=0, items=(("weights", model.weight_bytes),))
        self.batch = ResidentBatch(0, pool.block_size)
        self._pool = pool
        self._graphs = graphs
        # What the largest step took at an earlier start; None: each start measures.
        self._remembered = remembered
        self._group = group
        self._drafter = drafter
        # Rank 0 draws for all, and makes all texts.
        sampler: Sampler | None = None
        detokenizer: Detokenizer | None = None
        self._collector: Collector | None = None
        self.constraints: ConstrainedRows | None = None
        if group is None or group.rank == 0:
            sampler = Sampler(model.vocab_size, model.device, watermark)
            detokenizer = Detokenizer(tokenizer)
            self._collector = Collector(Emitter(detokenizer, projection))
            if make_constraints is not None:
                self.constraints = make_constraints(detokenizer)
        self._entry = RowEntry(model, detokenizer, self.constraints, drafter)
        self.computation = Computation(
            model, self.batch, sampler, constraints=self.constraints, group=group,
            batch_invariant=batch_invariant, reads_at_once=drafter is not None,
        )  # fmt: skip
        self.adapters: ActiveAdapters | None = None
        if adapters is not None and model.slots is not None:
            self.adapters = ActiveAdapters(
                adapters,
                model.slots,
                vocab_size=model.vocab_size,
                eos_token_ids=model.eos_token_ids,
                read_tokens=detokenizer.with_tokens if detokenizer is not None else None,
            )
        # What the pool that is there was made for.
        self._warm_for: WarmupSpec | None = None
        # When the step that was collected last was computed.
        self._last_computed_ns = 0
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

        What that step takes may be known of an earlier start; then a small one of the same kind is
        run. All rows are dropped. Asked for the same again, it keeps the pool that is there.
        StartupError says that the memory does not suffice.
        """
        self.clear()
        is_warm = spec == self._warm_for
        if self._group is not None:
            is_warm = bool(least_of(self._group, int(is_warm)))
        if is_warm:
            return self.num_blocks
        self._warm_for = None
        self.batch.start_anew(0)
        block_size = self._pool.block_size
        graphs = None if self._graphs is None else self._graphs.settings(spec)
        self.memory = size_pool(
            self.model, self._pool, spec, partial(self._run_largest, spec), graphs
        )
        num_blocks = self.memory.num_blocks
        if self._group is not None:
            num_blocks = least_of(self._group, num_blocks)
        with explained(
            f"a KV cache of {num_blocks} blocks cannot be had; "
            "lower --num-blocks or --kv-memory-fraction"
        ):
            self.model.allocate_cache(num_blocks, block_size)
        self._allocate_swap_space()
        if graphs is not None:
            self.model.capture_graphs(graphs)
        self.batch.start_anew(num_blocks)
        if self._drafter is not None:
            sampler = self.computation.sampler
            self._drafter.warm_up(
                spec,
                PassTimer(
                    self.model, sampler, self._group, num_blocks=num_blocks, block_size=block_size
                ),
            )
        self._warm_for = spec
        return num_blocks

    def _run_largest(self, spec: WarmupSpec) -> int:
        """Return the bytes that the largest step takes beside its cache."""
        known = self._remembered.recall(spec, self._pool) if self._remembered else None
        step = LargestStep(
            self.model,
            self.computation.sampler,
            spec if known is None else few_of(spec),
            block_size=self._pool.block_size,
            max_blocks=self._pool.num_blocks or spec.max_blocks or None,
            constrained=self.constraints is not None,
        )
        measured = step.run()
        if known is None and self._remembered is not None:
            self._remembered.remember(spec, self._pool, measured)
        return measured if known is None else max(known, measured)

    def _allocate_swap_space(self) -> None:
        """Make host memory for blocks, as many on each rank; their sizes may differ."""
        if self.model.is_encoder:
            return
        num_blocks = self._pool.swap_bytes // self.model.block_bytes(self._pool.block_size)
        if self._group is not None and self._pool.swap_bytes:
            num_blocks = least_of(self._group, num_blocks)
        with explained(f"{num_blocks} host blocks cannot be had; lower --swap-space"):
            self.block_move_s = self.model.allocate_swap_space(num_blocks)
        self.num_host_blocks = num_blocks

    def clear(self) -> None:
        """Drop all rows."""
        self.computation.forget()
        self.batch.start_anew(self.num_blocks)

    def drop(self, request_ids: list[RequestId]) -> None:
        """Drop rows; those that are not here are no error."""
        for request_id in request_ids:
            self.batch.drop(request_id)
            self.computation.interrupted.pop(request_id, None)

    def admit(self, new: NewRow, *, num_computed: int = 0) -> Row:
        """Take a row in, of which ``num_computed`` tokens are in the cache already.

        ValidationError says what is wrong with the row.
        """
        request_id = new.spec.request_id
        if request_id in self.batch:
            raise ValidationError(f"request {request_id} is resident already; drop it first")
        row = self._entry.row_of(new, self._adapter(new.spec.adapter), num_computed)
        interrupted = self.computation.interrupted.pop(request_id, None)
        if interrupted is not None and num_computed:
            row.go_on_gathering(interrupted)
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
        """Execute a plan from launch to outcome, before anything else.

        Bad rows end alone; ShardError refuses a plan that is no plan.
        """
        launched = self.launch(plan)
        outcome = self.collect(launched)
        self.computation.read()
        if self._group is not None:
            self._share_ends(launched)
        self._let_ended_go()
        return outcome

    def launch(self, plan: StepPlan) -> LaunchedStep:
        """Execute a plan but for its outcome: the next may be launched before this is collected."""
        step = LaunchedStep(OutcomeBuilder(plan.seq), started_ns=time.perf_counter_ns())
        self._check(plan)
        self.batch.start_step()
        self._let_ended_go()
        for request_id in plan.drop:
            self.batch.drop(request_id)
        self._change_adapters(plan, step.out)
        for new in plan.new_rows:
            self._admit(new, step.out)
        for request_id in plan.drop:
            # Whoever comes back does so in the step that drops it.
            self.computation.interrupted.pop(request_id, None)
        work = self._take_work(plan, step.out)
        if self._group is not None:
            step.comparison = RowComparison(self._group, plan.seq, work)
        make_copies(self.model, plan.copies)
        step.forward_ns = time.perf_counter_ns()
        try:
            self.computation.compute(work, step)
        except GroupBrokenError:
            # Ranks that compute different rows do not come to an end together.
            if step.comparison is not None and step.comparison.is_known:
                step.comparison.check()
            raise
        step.computed_ns = time.perf_counter_ns()
        return step

    def collect(self, step: LaunchedStep) -> StepOutcome:
        """Return the outcome of the step that was launched longest ago; any one thread.

        Ranks other than 0 have nothing to tell.
        """
        step.wait()
        started = time.perf_counter_ns()
        if self._collector is not None:
            self._collector.collect(step)
        outcome = step.out.outcome
        # A device comes to a step when it is done with the one before.
        begun = max(step.forward_ns, self._last_computed_ns)
        outcome.forward_ns = step.computed_ns - begun
        outcome.total_ns = outcome.forward_ns + (step.forward_ns - step.started_ns)
        outcome.total_ns += time.perf_counter_ns() - started
        self._last_computed_ns = step.computed_ns
        return outcome

    def _let_ended_go(self) -> None:
        """Let rows go of which the collector said that they end.

        On several ranks those go with the plan that drops them: when they ended only rank 0 knows.
        """
        while self._collector is not None and self._collector.ended:
            row = self._collector.ended.popleft()
            if self._group is None and self.batch.get(row.request_id) is row:
                self.batch.end(row.request_id)

    def _share_ends(self, step: LaunchedStep) -> None:
        """Tell all ranks what rank 0 told of the rows; those that end go on all of them."""
        assert self._group is not None
        share_ends(self._group, step.passes)
        for each in step.passes:
            ids = each.ids
            for item, num, finish in zip(each.drawing, each.num_told, each.finishes, strict=True):
                row_id = item.row.request_id
                if self._collector is None:
                    step.out.told(row_id, ids[:num], finish)
                ids = ids[1 + len(item.draft) :]
                if finish != FinishCode.RUNNING:
                    self.batch.end(row_id)
            if self._collector is None:
                for row in each.ended:
                    step.out.end(row.request_id)

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
        batch, block_size, granted, failed = self.batch, self.block_size, 0, False
        find = batch.rows.get
        twice = _named_twice(plan.row_ids)
        columns = zip(plan.row_ids, plan.num_tokens, plan.num_new_blocks, strict=True)
        for request_id, num_tokens, num_new in columns:
            row = find(request_id)
            start, granted = granted, granted + num_new
            if row is None and batch.has_ended(request_id):
                continue
            try:
                if row is None:
                    raise GenerationError(f"request {request_id} is not resident in this shard")
                if request_id in twice:
                    raise GenerationError("the step names the row twice")
                if num_new:
                    batch.grant(row, plan.new_blocks[start:granted])
                end = row.num_computed + num_tokens
                if end > row.num_tokens or end > row.num_blocks * block_size:
                    self._refuse_work(row, end)
            except Exception as error:  # noqa: BLE001 - it is this row's
                self._fail(request_id, error, out, doing="the row's part of the step is wrong")
                failed = True
                continue
            if num_tokens:
                (single if num_tokens == 1 else chunks).append(RowWork(row, num_tokens))
        work = [*single, *chunks]
        if failed:
            work = [item for item in work if item.row.request_id in batch]
        return work if self._drafter is None else self._drafter.added_to(work, block_size)

    def _refuse_work(self, row: Row, end: int) -> None:
        if end > row.num_tokens:
            raise GenerationError(
                f"asks to compute tokens up to {end}, but only {row.num_tokens} are known"
            )
        raise GenerationError(
            f"tokens up to {end} need more than the {row.num_blocks} blocks "
            f"of {self.block_size} that the row was granted"
        )

    def _fail(
        self, request_id: RequestId, error: Exception, out: OutcomeBuilder, *, doing: str
    ) -> None:
        out.fail(request_id, error, doing=doing)
        self.batch.end(request_id)


def _named_twice(row_ids: list[RequestId]) -> set[RequestId]:
    distinct = set(row_ids)
    if len(distinct) == len(row_ids):
        return set()
    return {each for each, count in Counter(row_ids).items() if count > 1}
