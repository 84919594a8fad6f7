"""A synchronous toy shard whose tokens depend on what its paged memory really holds."""

from __future__ import annotations

from dataclasses import dataclass, field

from lorax_contract.step import (
    FinishCode,
    NewRow,
    RequestId,
    RequestSpec,
    StepOutcome,
    StepPlan,
)

VOCAB_SIZE = 5
EOS = 0


def next_token(sequence: list[int]) -> int:
    """Return the token that follows a sequence: a small hash of all of it, rarely EOS."""
    value = 17
    for token in sequence:
        value = (value * 31 + token + 1) % 1_000_003
    return EOS if value % 19 == 0 else 1 + value // 7 % (VOCAB_SIZE - 1)


def expected_output(spec: RequestSpec) -> list[int]:
    """Return what an undisturbed run of the request alone gives."""
    sequence = list(spec.prompt_ids)
    while len(sequence) < len(spec.prompt_ids) + spec.stopping.max_new_tokens:
        sequence.append(next_token(sequence))
        if sequence[-1] == EOS:
            break
    return sequence[len(spec.prompt_ids) :]


@dataclass(slots=True)
class _Row:
    ids: list[int]
    num_prompt: int
    max_new: int
    blocks: list[int] = field(default_factory=list)
    num_computed: int = 0
    is_finished: bool = False


class ToyShard:
    """Executes plans on block memory; raises AssertionError when a plan breaks a rule."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self._block_size = block_size
        self._memory: dict[int, list[int]] = {
            block: [-1] * block_size for block in range(num_blocks)
        }
        self._rows: dict[RequestId, _Row] = {}
        self._seq = 0

    def execute(self, plan: StepPlan, failing: set[RequestId]) -> StepOutcome:
        """Run one step; rows in ``failing`` fail alone."""
        assert plan.seq == self._seq + 1, "steps must come in sequence"
        self._seq = plan.seq
        for request_id in plan.drop:
            del self._rows[request_id]
        for new in plan.new_rows:
            self._enter(new)
        outcome = StepOutcome(seq=plan.seq)
        grants = iter(plan.new_blocks)
        assert len(set(plan.row_ids)) == len(plan.row_ids)
        for request_id, num, num_new in zip(
            plan.row_ids, plan.num_tokens, plan.num_new_blocks, strict=True
        ):
            row = self._rows[request_id]
            self._grant(row, [next(grants) for _ in range(num_new)])
            if row.is_finished:
                continue
            if request_id in failing:
                row.is_finished = True
                self._report(outcome, request_id, [], FinishCode.ERROR)
            else:
                self._compute(outcome, request_id, row, num)
        assert next(grants, None) is None
        return outcome

    def _enter(self, new: NewRow) -> None:
        request_id = new.spec.request_id
        assert request_id not in self._rows, "a row enters twice"
        prompt = list(new.spec.prompt_ids)
        max_new = new.spec.stopping.max_new_tokens
        self._rows[request_id] = _Row([*prompt, *new.output_ids], len(prompt), max_new)

    def _grant(self, row: _Row, blocks: list[int]) -> None:
        owned = {block for other in self._rows.values() for block in other.blocks}
        assert not owned & set(blocks), "a block is granted while another row owns it"
        row.blocks += blocks

    def _compute(
        self, outcome: StepOutcome, request_id: RequestId, row: _Row, num: int
    ) -> None:
        stop = row.num_computed + num
        assert 0 < num and stop <= len(row.ids), "more tokens than there are"
        for position in range(row.num_computed, stop):
            block, offset = divmod(position, self._block_size)
            self._memory[row.blocks[block]][offset] = row.ids[position]
        row.num_computed = stop
        if stop < len(row.ids):
            return
        seen = [
            self._memory[row.blocks[p // self._block_size]][p % self._block_size]
            for p in range(stop)
        ]
        token = next_token(seen)
        row.ids.append(token)
        finish = FinishCode.RUNNING
        if token == EOS:
            finish = FinishCode.EOS_TOKEN
        elif len(row.ids) - row.num_prompt == row.max_new:
            finish = FinishCode.LENGTH
        row.is_finished = finish is not FinishCode.RUNNING
        self._report(outcome, request_id, [token], finish)

    def _report(
        self, outcome: StepOutcome, request_id: RequestId, tokens: list[int], finish: FinishCode
    ) -> None:
        outcome.row_ids.append(request_id)
        outcome.num_tokens.append(len(tokens))
        outcome.finish.append(finish)
        outcome.tokens.ids += tokens
