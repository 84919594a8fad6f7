"""The resident rows of FakeShard, and how they execute a step plan."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import nan

from lorax_contract.pooling import HeadFacts
from lorax_contract.step import (
    BASE_ADAPTER,
    AdapterHandle,
    Alternatives,
    BlockId,
    FinishCode,
    NewRow,
    OutputKind,
    RequestId,
    RequestSpec,
    RowDetail,
    StepOutcome,
    StepPlan,
    TokenColumns,
)
from lorax_router.shards.fake.memory import FakeMemory, FakeShardError
from lorax_router.shards.fake.model import FakeModel


class _Row:
    """One resident request; a finished one stays, inert, until it is dropped."""

    __slots__ = ("finished", "ids", "num_computed", "output", "spec", "table", "tells_prompt")

    def __init__(self, new: NewRow) -> None:
        self.spec = new.spec
        self.ids = [*new.spec.prompt_ids, *new.output_ids]
        self.output = list(new.output_ids)
        self.num_computed = new.num_cached
        self.table: list[BlockId] = []
        self.finished = False
        self.tells_prompt = new.spec.sampling.prompt_logprobs and not new.output_ids


class FakeBatch:
    """Executes plans on a FakeModel and a FakeMemory. Owned by a FakeShard.

    Breaking the contract of plans raises FakeShardError, whatever else the step holds.
    """

    def __init__(self, model: FakeModel, memory: FakeMemory, *, rank: int = 0) -> None:
        self._model = model
        self.memory = memory
        self._rank = rank
        self._rows: dict[RequestId, _Row] = {}
        self.active: set[AdapterHandle] = set()
        # Adapters that could not take effect when they were to, and why.
        self._inactive: dict[AdapterHandle, str] = {}
        # By handle, what adapters compute; the base model is none of them.
        self._contents: dict[AdapterHandle, str] = {}
        # Classification heads by what computes them; "": the model's own.
        self.heads: Mapping[str, HeadFacts] = {}

    @property
    def live(self) -> list[RequestId]:
        """The requests that are resident and have not finished."""
        return [request_id for request_id, row in self._rows.items() if not row.finished]

    @property
    def num_resident(self) -> int:
        """Rows that are not dropped yet, the finished ones among them."""
        return len(self._rows)

    def clear(self) -> None:
        """Drop all rows."""
        for request_id in list(self._rows):
            self._drop(request_id)

    def execute(
        self,
        plan: StepPlan,
        prepared: Mapping[AdapterHandle, str],
        failing: Mapping[RequestId, str],
        unable: Mapping[AdapterHandle, str] | None = None,
        harmful: Collection[RequestId] = (),
    ) -> StepOutcome:
        """Execute one step.

        ``failing`` names rows that must end in an error, with its text; ``unable`` adapters
        that do not take effect when they are to; ``harmful`` rows with which a pass fails.
        """
        outcome = StepOutcome(plan.seq)
        for request_id in plan.drop:
            self._drop(request_id)
        self._switch_adapters(outcome, plan, prepared, unable or {})
        for new in plan.new_rows:
            self._enter(new)
        for copy in plan.copies:
            self.memory.copy(copy)
        rows = self._grant(plan)
        for request_id, row in zip(plan.row_ids, rows, strict=True):
            why = failing.get(request_id) or self._inactive.get(row.spec.adapter)
            if why is not None and not row.finished:
                self._fail(outcome, request_id, row, why)
        computed = [
            (request_id, num, row)
            for request_id, num, row in zip(plan.row_ids, plan.num_tokens, rows, strict=True)
            if not row.finished
        ]
        if any(request_id in harmful for request_id, _, _ in computed):
            self._fail_pass(outcome, {request_id: row for request_id, _, row in computed})
            return outcome
        for request_id, num, row in computed:
            self._compute(outcome, request_id, row, num)
        return outcome

    def _fail_pass(self, outcome: StepOutcome, rows: Mapping[RequestId, _Row]) -> None:
        """Let a pass fail: its rows leave, and one that is alone is to blame."""
        if len(rows) == 1:
            for request_id, row in rows.items():
                self._fail(outcome, request_id, row, "the forward pass failed for this request")
            return
        outcome.failure = "planted"
        for request_id, row in rows.items():
            outcome.failed.append(request_id)
            self._end(row)

    def _drop(self, request_id: RequestId) -> None:
        row = self._rows.pop(request_id, None)
        if row is None:
            raise FakeShardError(f"request {request_id} is dropped but not resident")
        if not row.finished:
            self.memory.free(row.spec.request_id, row.table)

    def _switch_adapters(
        self,
        outcome: StepOutcome,
        plan: StepPlan,
        prepared: Mapping[AdapterHandle, str],
        unable: Mapping[AdapterHandle, str],
    ) -> None:
        self.active.difference_update(plan.deactivate)
        for row in self._rows.values():
            if row.spec.adapter in plan.deactivate and not row.finished:
                raise FakeShardError(
                    f"adapter {row.spec.adapter} ceases while request {row.spec.request_id} uses it"
                )
        for handle in plan.activate:
            if handle not in prepared:
                raise FakeShardError(f"adapter {handle} is activated but was not prepared")
            self._inactive.pop(handle, None)
            if handle in unable:
                self._inactive[handle] = outcome.inactive[handle] = unable[handle]
            else:
                self.active.add(handle)
                self._contents[handle] = prepared[handle]

    def _enter(self, new: NewRow) -> None:
        spec = new.spec
        if spec.request_id in self._rows:
            raise FakeShardError(f"request {spec.request_id} enters but is resident")
        if not spec.prompt_ids:
            raise FakeShardError(f"request {spec.request_id} enters without a prompt")
        has_adapter = spec.adapter in self.active or spec.adapter in self._inactive
        if spec.adapter != BASE_ADAPTER and not has_adapter:
            raise FakeShardError(
                f"request {spec.request_id} enters with adapter {spec.adapter}, which is not active"
            )
        self._rows[spec.request_id] = _Row(new)

    def _grant(self, plan: StepPlan) -> list[_Row]:
        """Hand out the new blocks and return the rows of the plan, in its order."""
        if len(set(plan.row_ids)) != len(plan.row_ids):
            raise FakeShardError(f"step {plan.seq} names a request twice: {plan.row_ids}")
        if sum(plan.num_new_blocks) != len(plan.new_blocks):
            raise FakeShardError(
                f"step {plan.seq} grants {sum(plan.num_new_blocks)} blocks "
                f"but names {len(plan.new_blocks)}"
            )
        rows = []
        start = 0
        for request_id, count in zip(plan.row_ids, plan.num_new_blocks, strict=True):
            row = self._rows.get(request_id)
            if row is None:
                raise FakeShardError(f"step {plan.seq} has request {request_id}: not resident")
            if count and not row.finished:
                blocks = plan.new_blocks[start : start + count]
                self._give(row, blocks)
            start += count
            rows.append(row)
        return rows

    def _give(self, row: _Row, blocks: list[BlockId]) -> None:
        """Append blocks to a row's table; the first of a row that enters may hold its tokens."""
        request_id = row.spec.request_id
        num_shared = 0 if row.table else -(-row.num_computed // self.memory.block_size)
        first = len(row.table)
        adapters = [self._computes(row.spec, first + number) for number in range(len(blocks))]
        known = row.ids[: row.num_computed]
        self.memory.share(request_id, adapters[:num_shared], blocks[:num_shared], known)
        self.memory.grant(request_id, blocks[num_shared:], adapters[num_shared:])
        row.table += blocks

    def _computes(self, spec: RequestSpec, number: int) -> str:
        """Return what computes a block of a row: an adapter's content, or from where in it on."""
        adapter, start = self._contents.get(spec.adapter, ""), spec.adapter_start or 0
        size = self.memory.block_size
        if start <= number * size:
            return adapter
        return "" if start >= (number + 1) * size else f"{adapter} from {start}"

    def _compute(self, outcome: StepOutcome, request_id: RequestId, row: _Row, num: int) -> None:
        start, end = row.num_computed, row.num_computed + num
        if num < 1 or end > len(row.ids):
            raise FakeShardError(
                f"request {request_id} is to compute {num} tokens from position {start}, "
                f"but {len(row.ids)} are known"
            )
        self.memory.write(request_id, row.table, start, row.ids[start:end])
        row.num_computed = end
        if end == len(row.ids):
            if row.spec.output is OutputKind.TOKENS:
                self._sample(outcome, request_id, row)
            else:
                self._end_prompt(outcome, request_id, row)

    def _end_prompt(self, outcome: StepOutcome, request_id: RequestId, row: _Row) -> None:
        vector = self._pooled(row)
        self._end(row)
        if self._rank == 0:
            outcome.row_ids.append(request_id)
            outcome.num_tokens.append(0)
            outcome.finish.append(int(FinishCode.LENGTH))
            detail = outcome.details[request_id] = self._detail(row, FinishCode.LENGTH)
            detail.vector = vector

    def _pooled(self, row: _Row) -> bytes | None:
        """Return what a row asks for that is made of what the last layer gives, if it asks for that."""
        spec, digest = row.spec, self.memory.digest(row.table)
        if spec.output is OutputKind.SCORES:
            head = self.heads.get(self._contents.get(spec.adapter, "")) or self.heads.get("")
            if head is None:
                raise FakeShardError(f"request {spec.request_id} asks for scores: there is no head")
            if spec.pooling is not head.pooling:
                raise FakeShardError(f"request {spec.request_id} pools by {spec.pooling!r}")
            return self._model.scores(spec, digest, head)
        return self._model.vector(spec, digest) if spec.output is OutputKind.VECTOR else None

    def _sample(self, outcome: StepOutcome, request_id: RequestId, row: _Row) -> None:
        model = self._model
        digest = self.memory.digest(row.table)
        token = model.next_token(row.spec, digest)
        row.ids.append(token)
        row.output.append(token)
        finish = model.finish(row.spec, row.output)
        if finish is not FinishCode.RUNNING:
            self._end(row)
        if self._rank:  # rank 0 answers for all
            return
        logprob = model.logprob(token, digest)
        outcome.row_ids.append(request_id)
        outcome.num_tokens.append(1)
        outcome.finish.append(int(finish))
        tokens = outcome.tokens
        tokens.ids.append(token)
        tokens.logprobs.append(logprob)
        tokens.texts.append(model.text_of(token))
        tokens.special.append(model.is_special(token))
        if finish or row.tells_prompt or row.spec.sampling.num_alternatives:
            detail = outcome.details[request_id] = self._detail(row, finish)
            if count := row.spec.sampling.num_alternatives:
                detail.alternatives = [model.alternatives(token, logprob, count)]

    def _detail(self, row: _Row, finish: FinishCode) -> RowDetail:
        detail = RowDetail()
        if finish:
            detail.generated_text = self._model.text(row.output)
        if row.tells_prompt:
            prompt = detail.prompt_tokens = self._prompt_tokens(row)
            if count := row.spec.sampling.num_prompt_alternatives:
                detail.prompt_alternatives = self._prompt_alternatives(prompt, count)
            row.tells_prompt = False
        return detail

    def _prompt_alternatives(self, prompt: TokenColumns, count: int) -> list[Alternatives]:
        """Return ``count`` tokens for each of the prompt but the first, the prompt's own first."""
        pairs = zip(prompt.ids[1:], prompt.logprobs[1:], strict=True)
        return [Alternatives([], [], []), *(self._model.alternatives(*p, count) for p in pairs)]

    def _prompt_tokens(self, row: _Row) -> TokenColumns:
        """Return the prompt with logprobs; nothing is known of its first token."""
        model = self._model
        ids = list(row.spec.prompt_ids)
        return TokenColumns(
            ids,
            [nan, *(model.logprob(token, i) for i, token in enumerate(ids[1:]))],
            [model.text_of(token) for token in ids],
            [model.is_special(token) for token in ids],
        )

    def _fail(self, outcome: StepOutcome, request_id: RequestId, row: _Row, text: str) -> None:
        self._end(row)
        if self._rank == 0:
            outcome.row_ids.append(request_id)
            outcome.num_tokens.append(0)
            outcome.finish.append(int(FinishCode.ERROR))
            outcome.details[request_id] = RowDetail(error_code="generation", error_text=text)

    def _end(self, row: _Row) -> None:
        row.finished = True
        self.memory.free(row.spec.request_id, row.table)
