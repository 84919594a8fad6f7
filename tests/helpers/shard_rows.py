"""Drives a shard by plans made by hand: chunks, decodes, rows that leave and come back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from lorax_contract.step import (
    AdapterHandle,
    Alternatives,
    BlockId,
    FinishCode,
    NewRow,
    RequestId,
    RequestSpec,
    StepOutcome,
    StepPlan,
    TokenColumns,
)
from lorax_router.core.ports import ShardClient


@dataclass(slots=True)
class ShardRow:
    """What is known of one request."""

    spec: RequestSpec
    output: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    num_computed: int = 0
    blocks: list[BlockId] = field(default_factory=list)
    is_resident: bool = False
    finish: FinishCode = FinishCode.RUNNING
    alternatives: list[Alternatives] = field(default_factory=list)
    prompt_tokens: TokenColumns | None = None
    # The whole text, or the error, at the end.
    text: str | None = None

    @property
    def is_live(self) -> bool:
        """Whether more is to come."""
        return self.finish == FinishCode.RUNNING

    @property
    def num_known(self) -> int:
        return len(self.spec.prompt_ids) + len(self.output)


class ShardRows:
    """The rows of one shard, and its blocks; ``seqs`` numbers the steps of its epoch."""

    def __init__(
        self, client: ShardClient, seqs: Iterator[int], *, num_blocks: int, block_size: int
    ) -> None:
        self._client, self._seqs, self._block_size = client, seqs, block_size
        self._free = [BlockId(block) for block in range(1, num_blocks)]
        self.rows: dict[RequestId, ShardRow] = {}

    def add(self, *specs: RequestSpec) -> None:
        """Note requests; they enter with the first step that computes something of them."""
        self.rows.update({spec.request_id: ShardRow(spec) for spec in specs})

    async def step(
        self,
        work: Mapping[int, int] | None = None,
        *,
        drop: Iterable[int] = (),
        activate: Iterable[AdapterHandle] = (),
        deactivate: Iterable[AdapterHandle] = (),
    ) -> StepOutcome:
        """Compute the next tokens of rows by request id; what is dropped starts anew."""
        plan = StepPlan(seq=next(self._seqs))
        plan.activate.extend(activate)
        plan.deactivate.extend(deactivate)
        for request_id in drop:
            row = self.rows[RequestId(request_id)]
            plan.drop.append(row.spec.request_id)
            self._free += row.blocks
            row.blocks, row.num_computed, row.is_resident = [], 0, False
        for request_id, num_tokens in (work or {}).items():
            self._plan_row(plan, self.rows[RequestId(request_id)], num_tokens)
        outcome = await self._client.step(plan)
        self._book(outcome)
        return outcome

    async def run(
        self,
        max_tokens: int,
        *,
        activate: Iterable[AdapterHandle] = (),
        until: Callable[[], bool] = lambda: False,
    ) -> None:
        """Run all rows to their end, in steps of at most so many tokens."""
        while not until() and (work := self._next_work(max_tokens)):
            await self.step(work, activate=activate)
            activate = ()

    def _next_work(self, max_tokens: int) -> dict[int, int]:
        work: dict[int, int] = {}
        running = [row for row in self.rows.values() if row.is_live]
        for row in sorted(running, key=lambda row: row.num_known - row.num_computed > 1):
            num_tokens = min(max_tokens, row.num_known - row.num_computed)
            if num_tokens:
                work[row.spec.request_id] = num_tokens
                max_tokens -= num_tokens
        return work

    def _plan_row(self, plan: StepPlan, row: ShardRow, num_tokens: int) -> None:
        if not row.is_resident:
            plan.new_rows.append(NewRow(row.spec, list(row.output)))
            row.is_resident = True
        row.num_computed += num_tokens
        needed = -(-row.num_computed // self._block_size) - len(row.blocks)
        new = [self._free.pop(0) for _ in range(needed)]
        row.blocks += new
        plan.row_ids.append(row.spec.request_id)
        plan.num_tokens.append(num_tokens)
        plan.num_new_blocks.append(len(new))
        plan.new_blocks.extend(new)

    def _book(self, outcome: StepOutcome) -> None:
        start, tokens = 0, outcome.tokens
        for request_id, count, finish in zip(
            outcome.row_ids, outcome.num_tokens, outcome.finish, strict=True
        ):
            row, end = self.rows[request_id], start + count
            row.output += tokens.ids[start:end]
            row.logprobs += tokens.logprobs[start:end]
            row.texts += tokens.texts[start:end]
            row.finish = FinishCode(finish)
            if (detail := outcome.details.get(request_id)) is not None:
                row.alternatives += detail.alternatives
                row.prompt_tokens = detail.prompt_tokens or row.prompt_tokens
                row.text = detail.error_text or detail.generated_text
            start = end
