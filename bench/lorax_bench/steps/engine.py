"""Rows in a shard's engine that decode for ever, and prompts that come and go."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from lorax_contract.config import ShardConfig
from lorax_contract.step import (
    BlockId,
    NewRow,
    RequestId,
    RequestSpec,
    SamplingParams,
    StepOutcome,
    StepPlan,
    StoppingParams,
    WarmupSpec,
)
from lorax_shard.engine.engine import Engine
from lorax_shard.engine.graph_limits import GraphLimits
from lorax_shard.engine.memory import PoolSettings
from lorax_shard.model.loader import load_paged_model

BLOCK_SIZE = 16
# Steps that rows decode at most, each round and each batch.
_MOST_STEPS = 512


def make_engine(
    model_dir: Path, *, context: int, max_rows: int, max_tokens: int, linear: str = "auto"
) -> Engine:
    """Load a model as a shard does, with room for so many rows of a context, and for such a prompt."""
    longest = max(context + _MOST_STEPS, max_tokens + 1)
    num_blocks = max_rows * (-(-(context + _MOST_STEPS) // BLOCK_SIZE)) + -(-longest // BLOCK_SIZE)
    config = ShardConfig(
        model_dir=str(model_dir), model_id="bench", shard_uris=["unix:/unused"],
        linear_backend=linear,
    )  # fmt: skip
    engine = Engine(
        load_paged_model(config),
        Tokenizer.from_file(str(model_dir / "tokenizer.json")),
        PoolSettings(block_size=BLOCK_SIZE, memory_fraction=0.5, num_blocks=num_blocks),
        graphs=GraphLimits.of(config, 0),
    )
    engine.warm_up(
        WarmupSpec(
            max_input_length=longest - 1,
            max_total_tokens=longest,
            max_step_tokens=max(max_rows, max_tokens),
            max_rows=max_rows,
        )
    )
    return engine


class DecodingRows:
    """Rows that decode for ever, behind a context of their own each: pieces of a text, if one is given."""

    def __init__(
        self, engine: Engine, num_rows: int, context: int, text: Sequence[int] | None = None
    ) -> None:
        engine.clear()
        self._engine, self._length, self._next_block = engine, context, 0
        self._ids = [RequestId(index + 1) for index in range(num_rows)]
        plan = StepPlan(1, self._ids, [context] * num_rows)
        plan.num_new_blocks = [-(-context // BLOCK_SIZE)] * num_rows
        plan.new_blocks = self._take(sum(plan.num_new_blocks))
        pieces = (_piece(engine, each, context, text) for each in self._ids)
        plan.new_rows = [new_row(engine, *each) for each in zip(self._ids, pieces, strict=True)]
        outcome = engine.step(plan)
        assert len(outcome.tokens.ids) == num_rows, "the engine refuses the rows"

    def plan(self) -> StepPlan:
        """Return the next step."""
        num_rows = len(self._ids)
        plan = StepPlan(1, self._ids, [1] * num_rows)
        new = int(self._length % BLOCK_SIZE == 0)
        plan.num_new_blocks = [new] * num_rows
        plan.new_blocks = self._take(new * num_rows)
        self._length += 1
        return plan

    def __call__(self) -> StepOutcome:
        """Compute the next step."""
        return self._engine.step(self.plan())

    def _take(self, number: int) -> list[BlockId]:
        self._next_block += number
        return [BlockId(block) for block in range(self._next_block - number, self._next_block)]


class Prompts:
    """Prompts of one length, one a step."""

    def __init__(self, engine: Engine, num_tokens: int) -> None:
        engine.clear()
        self._engine, self._num_tokens, self._next = engine, num_tokens, 0

    def __call__(self) -> StepOutcome:
        """Compute a prompt that nobody asked before, and its first token."""
        self._next += 1
        request_id, num_tokens = RequestId(self._next), self._num_tokens
        plan = StepPlan(1, [request_id], [num_tokens])
        num_blocks = -(-num_tokens // BLOCK_SIZE)
        plan.num_new_blocks = [num_blocks]
        plan.new_blocks = [BlockId(block) for block in range(num_blocks)]
        plan.new_rows = [
            new_row(self._engine, request_id, _piece(self._engine, request_id, num_tokens))
        ]
        outcome = self._engine.step(plan)
        self._engine.drop([request_id])
        return outcome


def new_row(engine: Engine, request_id: RequestId, prompt_ids: list[int]) -> NewRow:
    """Return a row that goes on as long as the model allows."""
    left = min(_MOST_STEPS, engine.model.max_positions - len(prompt_ids))
    stopping = StoppingParams(max_new_tokens=left, ignore_eos=True)
    spec = RequestSpec(
        request_id=request_id, prompt_ids=prompt_ids, sampling=SamplingParams(), stopping=stopping
    )
    return NewRow(spec, ())


def _piece(
    engine: Engine, request_id: RequestId, num_tokens: int, text: Sequence[int] | None = None
) -> list[int]:
    """Return a piece of a text, another one for each request; without one ids that are no text."""
    if text is not None:
        at = 37 * request_id
        return list(text[at : at + num_tokens])
    vocab_size = engine.model.vocab_size
    first = min(100, vocab_size // 2)
    return [(17 * request_id + 31 * at) % (vocab_size - first) + first for at in range(num_tokens)]
