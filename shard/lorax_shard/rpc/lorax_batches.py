"""LoRAX's own semantics over the engine: batches that the shard keeps between calls.

A caller that knows only LoRAX's interface prefills a batch with blocks given up
front (or none: the shard then takes free ones), decodes cached batches a token
at a time, and filters out what ended. Its replies nest one Generation per row.

That interface has no place for the error of one row. A request that cannot be
taken refuses its whole Prefill before anything changes; a row that fails while
it is computed fails the call and drops the call's batch, so that no later call
can miss a token that was computed and never answered.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from lorax_contract.errors import GenerationError, LoraxError, ShardError, ValidationError
from lorax_contract.step import (
    Alternatives,
    BlockId,
    FinishCode,
    RequestId,
    RowDetail,
    SamplingParams,
    StepOutcome,
    StepPlan,
)
from lorax_proto import generate_pb2 as pb
from lorax_proto.convert import prompt_to_proto
from lorax_shard.engine.engine import Engine
from lorax_shard.engine.rows import Row
from lorax_shard.rpc.lorax_requests import LoraxRequest, read_request

_FINISH_REASONS = {
    FinishCode.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishCode.EOS_TOKEN: pb.FINISH_REASON_EOS_TOKEN,
    FinishCode.STOP_SEQUENCE: pb.FINISH_REASON_STOP_SEQUENCE,
}


@dataclass(slots=True)
class _Member:
    """One row of a cached batch; it stays a member after its end, until it is filtered out."""

    row: Row
    # How far the prompt may be computed in the current call.
    chunk_end: int
    # The row's blocks, in tokens: LoRAX reserves them all at once.
    num_reserved_tokens: int
    num_generated: int = 0
    # Tokens that came with an earlier one.
    num_skipped: int = 0
    ended: bool = False

    @property
    def is_prefilling(self) -> bool:
        return self.row.num_computed < self.row.num_prompt_tokens

    @property
    def num_next_tokens(self) -> int:
        """Tokens a step could compute of the row."""
        return 0 if self.ended else self.row.num_tokens - self.row.num_computed


@dataclass(slots=True)
class _CachedBatch:
    batch_id: int
    members: dict[RequestId, _Member] = field(default_factory=dict)

    def live(self) -> Iterator[_Member]:
        return (member for member in self.members.values() if not member.ended)

    def message(self) -> pb.CachedBatch:
        members = self.members.values()
        return pb.CachedBatch(
            id=self.batch_id,
            request_ids=list(self.members),
            size=len(self.members),
            max_tokens=sum(member.num_reserved_tokens for member in members),
            current_tokens=sum(member.num_next_tokens for member in members),
        )


@dataclass(frozen=True, slots=True)
class BatchReply:
    """What a Prefill or Decode gives back; no batch when all its rows have ended."""

    generations: list[pb.Generation]
    batch: pb.CachedBatch | None


class LoraxBatches:
    """The cached batches of one rank. Runs in the command queue's thread only."""

    def __init__(
        self,
        engine: Engine,
        *,
        max_step_tokens: int = 512,
        max_input_length: int = 0,
        rank: int = 0,
    ) -> None:
        # Tokens that one engine step computes at most; the warm-up call names it.
        self.max_step_tokens = max_step_tokens
        self._engine = engine
        self._max_input_length = max_input_length
        self._rank = rank
        self._batches: dict[int, _CachedBatch] = {}

    def read(self, message: pb.Batch) -> list[LoraxRequest]:
        """Read and tokenize the requests of a batch; touches no state, any thread."""
        engine = self._engine
        return [
            read_request(each, engine.tokenizer, engine.block_size, self._max_input_length)
            for each in message.requests
        ]

    def prefill(
        self, batch_id: int, requests: list[LoraxRequest], cached_id: int | None
    ) -> BatchReply:
        """Compute new rows, the rows of a cached batch beside them, and cache them as one."""
        if not self._engine.num_blocks:
            raise ShardError("there is no KV pool yet; call Warmup before the first Prefill")
        cached = self._known(cached_id) if cached_id is not None else None
        if cached is None and batch_id in self._batches:
            raise ValidationError(f"batch {batch_id} is cached already; clear it first")
        if not requests:
            raise ValidationError(f"batch {batch_id} has no requests")
        members = self._admit_all(requests)
        batch = _CachedBatch(batch_id) if cached is None else self._batches.pop(cached.batch_id)
        running = [member for member in batch.live() if not member.is_prefilling]
        chunks = self._next_chunks(batch, self.max_step_tokens - len(running))
        batch.members.update(members)
        chunks.update({request_id: member.chunk_end for request_id, member in members.items()})
        generations = self._advance(batch, running, chunks)
        return self._reply(batch, generations)

    def decode(self, batch_ids: list[int]) -> BatchReply:
        """Advance batches by one step; several become one under the first one's id."""
        if not batch_ids:
            raise ValidationError("a decode names no batch")
        if len(set(batch_ids)) != len(batch_ids):
            raise ValidationError("a decode names a batch twice")
        parts = [self._known(batch_id) for batch_id in batch_ids]
        batch = _CachedBatch(batch_ids[0])
        for part in parts:
            batch.members.update(part.members)
            del self._batches[part.batch_id]
        running = [member for member in batch.live() if not member.is_prefilling]
        chunks = self._next_chunks(batch, self.max_step_tokens - len(running))
        generations = self._advance(batch, running, chunks)
        return self._reply(batch, generations)

    def pooled(self, requests: list[LoraxRequest]) -> dict[RequestId, bytes]:
        """Compute rows that ask for vectors or scores, and let them go; rank 0 knows what they are.

        A prompt is computed whole where there is room for it in a step.
        """
        if not self._engine.num_blocks:
            raise ShardError("there is no KV pool yet; call Warmup before the first row")
        batch = _CachedBatch(0, self._admit_all(requests))
        found: dict[RequestId, bytes] = {}
        try:
            while plan := self._whole_prompts(batch):
                outcome = self._checked(batch, plan)
                for request_id in outcome.row_ids:
                    batch.members[request_id].ended = True
                    detail = outcome.details.get(request_id, RowDetail())
                    if detail.vector is not None:
                        found[request_id] = detail.vector
        finally:
            self._engine.drop(list(batch.members))
        return found

    def _whole_prompts(self, batch: _CachedBatch) -> StepPlan | None:
        """Return a step that computes as many prompts as fit; None: all are computed."""
        plan, budget = StepPlan(seq=0), max(1, self.max_step_tokens)
        for member in batch.live():
            left = member.row.num_prompt_tokens - member.row.num_computed
            if left > budget and (plan.row_ids or self._engine.model.is_encoder):
                if not plan.row_ids:
                    raise ValidationError(
                        f"request {member.row.request_id}: {left} tokens do not fit in a step of "
                        f"{budget}, and an encoder computes them at once"
                    )
                break
            num_tokens = min(left, budget)
            if num_tokens:
                plan.row_ids.append(member.row.request_id)
                plan.num_tokens.append(num_tokens)
                plan.num_new_blocks.append(0)
                budget -= num_tokens
        return plan if plan.row_ids else None

    def filter(self, batch_id: int, keep: list[int]) -> pb.CachedBatch:
        """Keep the named requests of a batch, drop the others."""
        batch = self._known(batch_id)
        if unknown := [request_id for request_id in keep if request_id not in batch.members]:
            raise ValidationError(f"batch {batch_id} has no request {unknown[0]}")
        if not keep:
            raise ValidationError(
                f"nothing of batch {batch_id} would be left; use ClearCache to drop it"
            )
        self._engine.drop([member for member in batch.members if member not in set(keep)])
        batch.members = {RequestId(kept): batch.members[RequestId(kept)] for kept in keep}
        return batch.message()

    def clear(self, batch_id: int | None) -> None:
        """Drop one batch, or all rows when none is named; an unknown batch is no error."""
        if batch_id is None:
            self._batches.clear()
            self._engine.clear()
        elif (batch := self._batches.pop(batch_id, None)) is not None:
            self._engine.drop(list(batch.members))

    def _known(self, batch_id: int) -> _CachedBatch:
        try:
            return self._batches[batch_id]
        except KeyError:
            raise ValidationError(
                f"batch {batch_id} is not cached here; it ended, was cleared or never came"
            ) from None

    def _admit_all(self, requests: Iterable[LoraxRequest]) -> dict[RequestId, _Member]:
        """Take all requests in, or none: ValidationError names the one at fault."""
        engine = self._engine
        members: dict[RequestId, _Member] = {}
        try:
            for request in requests:
                member = self._admit(request)
                members[member.row.request_id] = member
        except Exception as error:
            engine.drop(list(members))
            if not isinstance(error, LoraxError):
                raise
            request_id = request.new_row.spec.request_id
            raise ValidationError(f"request {request_id}: {error}") from error
        return members

    def _admit(self, request: LoraxRequest) -> _Member:
        engine, block_size = self._engine, self._engine.block_size
        adapter = request.new_row.spec.adapter
        if request.is_text and engine.has_own_tokens(adapter):
            raise ValidationError(
                f"adapter {adapter} has a tokenizer of its own, which is not run here; "
                "send the prompt as token ids"
            )
        num_blocks = -(-request.num_reserved_tokens // block_size)
        blocks = request.blocks or self._free_blocks(num_blocks)
        # The last token of an output is never computed, so its place may be missing.
        if len(blocks) * block_size < request.num_reserved_tokens - 1:
            raise ValidationError(
                f"{len(blocks)} blocks of {block_size} hold less than the "
                f"{request.num_reserved_tokens} tokens of prompt and output"
            )
        row = engine.admit(request.new_row, num_computed=request.num_cached)
        try:
            engine.batch.grant(row, list(blocks))
        except LoraxError:
            engine.drop([row.request_id])
            raise
        return _Member(row, request.chunk_end, len(blocks) * block_size)

    def _free_blocks(self, count: int) -> list[BlockId]:
        """Return blocks that no resident row holds; block 0 is left to health checks."""
        engine = self._engine
        held = {block for row in engine.batch for block in engine.batch.blocks_of(row)}
        free = (block for block in range(1, engine.num_blocks) if block not in held)
        blocks = [BlockId(block) for _, block in zip(range(count), free, strict=False)]
        if len(blocks) < count:
            raise ValidationError(
                f"needs {count} blocks, but only {len(blocks)} of the pool's "
                f"{engine.num_blocks} are free"
            )
        return blocks

    def _next_chunks(self, batch: _CachedBatch, budget: int) -> dict[RequestId, int]:
        """Return up to where each unfinished prompt is computed next, older requests first."""
        chunks: dict[RequestId, int] = {}
        for member in batch.live():
            row = member.row
            if member.is_prefilling and budget > 0:
                num_tokens = min(budget, row.num_prompt_tokens - row.num_computed)
                chunks[row.request_id] = row.num_computed + num_tokens
                budget -= num_tokens
        return chunks

    def _advance(
        self,
        batch: _CachedBatch,
        running: list[_Member],
        chunks: dict[RequestId, int],
    ) -> list[pb.Generation]:
        """Run steps until running rows gained a token and prompts came to their chunk's end."""
        generations: list[pb.Generation] = []
        single = [member.row.request_id for member in running]
        while True:
            plan = StepPlan(seq=0)
            self._plan_step(plan, batch, single, chunks)
            if not plan.row_ids:
                return generations
            single = []
            try:
                generations.extend(self._run(batch, plan, set(chunks)))
            except Exception:
                # The rows that did gain a token would miss it in their caller's eyes.
                self._engine.drop(list(batch.members))
                raise

    def _plan_step(
        self,
        plan: StepPlan,
        batch: _CachedBatch,
        single: list[RequestId],
        chunks: dict[RequestId, int],
    ) -> None:
        budget = max(1, self.max_step_tokens - len(single))
        wanted = [(request_id, 1) for request_id in single]
        for request_id, end in chunks.items():
            member = batch.members[request_id]
            num_tokens = 0 if member.ended else min(budget, end - member.row.num_computed)
            if num_tokens > 0:
                wanted.append((request_id, num_tokens))
                budget -= num_tokens
        for request_id, num_tokens in wanted:
            plan.row_ids.append(request_id)
            plan.num_tokens.append(num_tokens)
            plan.num_new_blocks.append(0)

    def _run(
        self, batch: _CachedBatch, plan: StepPlan, prefilled: set[RequestId]
    ) -> Iterator[pb.Generation]:
        outcome = self._checked(batch, plan)
        start = 0
        for request_id, num, finish in zip(
            outcome.row_ids, outcome.num_tokens, outcome.finish, strict=True
        ):
            member, tokens = batch.members[request_id], slice(start, start + num)
            start += num
            member.num_generated += num
            member.num_skipped += max(num - 1, 0)
            member.ended = finish != FinishCode.RUNNING
            # Rank 0 answers for all.
            if self._rank == 0:
                yield _generation(
                    outcome, tokens, FinishCode(finish), member, is_first=request_id in prefilled
                )

    def _checked(self, batch: _CachedBatch, plan: StepPlan) -> StepOutcome:
        """Compute a step; GenerationError if one of its rows failed."""
        outcome = self._engine.step(plan)
        if outcome.failed:
            self._engine.drop(list(batch.members))
            # Nobody will find out which row is to blame: it may be none.
            self._engine.computation.test_device(self._free_blocks(1)[0])
            raise GenerationError(
                f"the forward pass failed for these {len(outcome.failed)} requests together: "
                f"{outcome.failure}; send them one by one"
            )
        for request_id, finish in zip(outcome.row_ids, outcome.finish, strict=True):
            if finish == FinishCode.ERROR:
                detail = outcome.details.get(request_id)
                reason = "rank 0 says why" if detail is None else detail.error_text
                raise GenerationError(f"request {request_id}: {reason}")
        return outcome

    def _reply(self, batch: _CachedBatch, generations: list[pb.Generation]) -> BatchReply:
        if not any(batch.live()):
            return BatchReply(generations, None)
        self._batches[batch.batch_id] = batch
        return BatchReply(generations, batch.message())


def _generation(
    outcome: StepOutcome, new: slice, finish: FinishCode, member: _Member, *, is_first: bool
) -> pb.Generation:
    """Return the message of one row's new tokens; ``is_first`` marks the end of a prompt."""
    row, tokens = member.row, outcome.tokens
    detail = outcome.details.get(row.request_id, RowDetail())
    next_tokens = pb.NextTokens(
        ids=tokens.ids[new],
        logprobs=tokens.logprobs[new],
        texts=tokens.texts[new],
        is_special=tokens.special[new],
        alternative_tokens=[_alternatives(each) for each in detail.alternatives],
    )
    generation = pb.Generation(request_id=row.request_id, next_tokens=next_tokens)
    if is_first:
        generation.prefill_tokens_length = row.num_prompt_tokens
    if detail.prompt_tokens is not None:
        prompt = prompt_to_proto(detail.prompt_tokens, detail.prompt_alternatives)
        generation.prefill_tokens.CopyFrom(prompt)
    if member.ended:
        generation.generated_text.CopyFrom(
            _generated_text(detail.generated_text or "", finish, member, row.params)
        )
    return generation


def _alternatives(some: Alternatives) -> pb.AlternativeTokens:
    return pb.AlternativeTokens(ids=some.ids, logprobs=some.logprobs, texts=some.texts)


def _generated_text(
    text: str, finish: FinishCode, member: _Member, params: SamplingParams
) -> pb.GeneratedText:
    return pb.GeneratedText(
        text=text,
        generated_tokens=member.num_generated,
        skipped_tokens=member.num_skipped,
        finish_reason=_FINISH_REASONS[finish],
        seed=params.seed if params.do_sample else None,
    )
