"""A deterministic PagedModel that reads its paged cache, so that wrong blocks change tokens.

Each slot of the cache holds a token id and its position. The logits of a token are
drawn from a hash of all (id, position) pairs that its row's block table shows, up to
its own position: a lost, shared or stale block or a wrong position changes them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from tests.helpers.tiny_models import VOCAB_SIZE, make_tokenizer
from tokenizers import Tokenizer

from lorax_contract.constraint import Constraint
from lorax_contract.pooling import Pooling
from lorax_contract.step import (
    BlockId,
    FinishCode,
    NewRow,
    OutputKind,
    RequestId,
    RequestSpec,
    SamplingParams,
    StepOutcome,
    StepPlan,
    StoppingParams,
    WarmupSpec,
)
from lorax_shard.attention.backend import StepMetadata
from lorax_shard.constraints.setup import constraints_maker
from lorax_shard.engine.drafter import Drafter
from lorax_shard.engine.engine import Engine
from lorax_shard.engine.memory import PoolSettings
from lorax_shard.model.interface import HiddenStates
from lorax_shard.parallel.group import RankGroup

BLOCK_SIZE = 4
# The forward pass raises when it meets the first, and gives NaN logits after the second.
POISON_ID, NAN_ID = 380, 381
HIDDEN_SIZE = 8


class ToyModel:
    """Implements ``lorax_shard.model.interface.PagedModel`` over hashes."""

    model_type = "toy"
    max_positions = 512
    window_size = None
    dtype = torch.float32
    device = torch.device("cpu")
    weight_bytes = 1000
    attention_backend = "toy"
    linear_backend = "toy"
    elementwise_backend = "toy"
    lora_backend = ""
    graphs = None
    slots = None
    is_encoder = False
    generates = True

    def __init__(self, eos_token_ids: Sequence[int] = ()) -> None:
        self.vocab_size = VOCAB_SIZE
        self.eos_token_ids = frozenset(eos_token_ids)
        # The query lengths of every forward pass.
        self.passes: list[list[int]] = []
        self._block_size = BLOCK_SIZE
        self._cache: torch.Tensor | None = None
        self._kept: HiddenStates | None = None

    def block_bytes(self, block_size: int) -> int:
        return 16 * block_size

    def allocate_cache(self, num_blocks: int, block_size: int) -> None:
        self._block_size = block_size
        self._cache = torch.full((num_blocks * block_size, 2), -1, dtype=torch.int64)

    def free_cache(self) -> None:
        self._cache = None

    def copy_blocks(self, source: list[int], destination: list[int]) -> None:
        blocks = self._pool.view(-1, self._block_size, 2)
        blocks[destination] = blocks[source].clone()

    def allocate_swap_space(self, num_blocks: int) -> float:
        self._host = torch.full((num_blocks, self._block_size, 2), -1, dtype=torch.int64)
        return 1e-6 * bool(num_blocks)

    def swap_out(self, blocks: list[int], host_blocks: list[int]) -> None:
        self._host[host_blocks] = self._pool.view(-1, self._block_size, 2)[blocks]

    def swap_in(self, host_blocks: list[int], blocks: list[int]) -> None:
        self._pool.view(-1, self._block_size, 2)[blocks] = self._host[host_blocks]

    def make_metadata(self, query_lens, context_lens, slots, block_tables, num_decode_rows):
        assert query_lens[:num_decode_rows] == [1] * num_decode_rows
        assert 1 not in query_lens[num_decode_rows:]
        return StepMetadata(
            query_lens, context_lens, slots, block_tables, num_decode_rows, None, None
        )

    def forward(
        self, input_ids, positions, metadata, logit_rows, slots=(), slot_lens=None, segments=None
    ):
        self.passes.append(list(metadata.query_lens))
        if (input_ids == POISON_ID).any():
            raise RuntimeError("poison")
        self._pool[metadata.slots] = torch.stack([input_ids, positions], dim=1)
        rows = torch.repeat_interleave(torch.tensor(metadata.query_lens))

        def after(token: int) -> torch.Tensor:
            table = metadata.block_tables[rows[token]]
            seen = torch.arange(int(positions[token]) + 1)
            slots = table[seen // self._block_size] * self._block_size + seen % self._block_size
            return logits_after(tuple(map(tuple, self._pool[slots].tolist())))

        if self._kept is not None:
            states = [hidden_of(after(token)) for token in range(len(input_ids))]
            self._kept.states = torch.stack(states)
        logits = [after(token) for token in logit_rows.tolist()]
        return torch.stack(logits) if logits else torch.empty(0, self.vocab_size)

    def head(self, kind):
        return None

    @contextmanager
    def keeping_hidden(self) -> Iterator[HiddenStates]:
        self._kept = HiddenStates()
        try:
            yield self._kept
        finally:
            self._kept = None

    @property
    def _pool(self) -> torch.Tensor:
        assert self._cache is not None
        return self._cache


@functools.lru_cache(maxsize=4096)
def logits_after(pairs: tuple[tuple[int, int], ...]) -> torch.Tensor:
    """Return the logits after (id, position) pairs."""
    if pairs[-1][0] == NAN_ID:
        return torch.full((VOCAB_SIZE,), float("nan"))
    digest = 0
    for token_id, position in pairs:
        digest = (digest * 1_000_003 + token_id * 8191 + position + 1) % (2**61 - 1)
    generator = torch.Generator().manual_seed(digest)
    logits = torch.randn(VOCAB_SIZE, generator=generator) * 3
    logits[[POISON_ID, NAN_ID]] = -30.0  # never the choice of a test that goes well
    return logits


def hidden_of(logits: torch.Tensor) -> torch.Tensor:
    """Return what the toy's last layer gives where it gives these logits."""
    return logits[:HIDDEN_SIZE]


def expected_vector(prompt: Sequence[int], pooling: Pooling) -> torch.Tensor:
    """Return the vector of a prompt."""
    pairs = tuple((token_id, position) for position, token_id in enumerate(prompt))
    states = [hidden_of(logits_after(pairs[: end + 1])) for end in range(len(pairs))]
    return pooled(torch.stack(states), pooling)


def pooled(states: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    """Return what is made of the states of a whole prompt (n x hidden), in one go."""
    num = len(states)
    weights = torch.arange(1.0, num + 1)
    made: dict[Pooling, Callable[[], torch.Tensor]] = {
        Pooling.LAST: lambda: states[-1],
        Pooling.FIRST: lambda: states[0],
        Pooling.MEAN: lambda: states.mean(dim=0),
        Pooling.MAX: lambda: states.max(dim=0).values,
        Pooling.MEAN_SQRT: lambda: states.sum(dim=0) / num**0.5,
        Pooling.WEIGHTED_MEAN: lambda: (weights[:, None] * states).sum(dim=0) / weights.sum(),
        Pooling.EACH: lambda: states.flatten(),
    }
    return made[pooling]()


def expected_tokens(prompt: Sequence[int], count: int) -> list[int]:
    """Return the greedy continuation of a prompt."""
    ids = list(prompt)
    for _ in range(count):
        pairs = tuple((token_id, position) for position, token_id in enumerate(ids))
        ids.append(int(logits_after(pairs).argmax()))
    return ids[len(prompt) :]


@functools.cache
def toy_tokenizer() -> Tokenizer:
    """Return a byte-level tokenizer of the toy's vocabulary."""
    with TemporaryDirectory() as folder:
        return make_tokenizer(Path(folder))


def make_engine(
    *,
    num_blocks: int = 64,
    eos_token_ids: Sequence[int] = (),
    batch_invariant: bool = False,
    group: RankGroup | None = None,
    constrained: bool = False,
    num_host_blocks: int = 0,
    drafter: Drafter | None = None,
    max_rows: int = 4,
) -> Engine:
    """Return a warm engine over a toy model; ``constrained``: one that binds outputs."""
    pool = PoolSettings(
        block_size=BLOCK_SIZE, memory_fraction=0.5, num_blocks=num_blocks,
        swap_bytes=num_host_blocks * 16 * BLOCK_SIZE,
    )  # fmt: skip
    model = ToyModel(eos_token_ids)
    maker = constraints_maker(toy_tokenizer(), VOCAB_SIZE, eos_token_ids) if constrained else None
    engine = Engine(
        model,
        toy_tokenizer(),
        pool,
        batch_invariant=batch_invariant,
        group=group,
        drafter=drafter,
        make_constraints=maker,
    )
    engine.warm_up(
        WarmupSpec(max_input_length=32, max_total_tokens=48, max_step_tokens=16, max_rows=max_rows)
    )
    model.passes.clear()
    return engine


def new_row(
    request_id: int,
    prompt: Sequence[int],
    *,
    output: Sequence[int] = (),
    max_new_tokens: int = 8,
    ignore_eos: bool = False,
    stop_sequences: tuple[str, ...] = (),
    stop_token_ids: tuple[int, ...] = (),
    min_new_tokens: int = 0,
    constraint: Constraint | None = None,
    pooling: Pooling | None = None,
    **sampling: object,
) -> NewRow:
    """Return a row that enters.

    With ``max_new_tokens`` 0 it asks for no tokens, with ``pooling`` for a vector.
    """
    kind = OutputKind.TOKENS if max_new_tokens else OutputKind.PROMPT
    spec = RequestSpec(
        request_id=RequestId(request_id),
        prompt_ids=list(prompt),
        sampling=SamplingParams(**sampling),
        stopping=StoppingParams(
            max_new_tokens=0 if pooling is not None else max_new_tokens,
            min_new_tokens=min_new_tokens,
            ignore_eos=ignore_eos,
            stop_sequences=stop_sequences,
            stop_token_ids=stop_token_ids,
        ),
        output=kind if pooling is None else OutputKind.VECTOR,
        pooling=pooling or Pooling.LAST,
        constraint=constraint,
    )
    return NewRow(spec, list(output))


def make_plan(
    seq: int = 1,
    work: Sequence[tuple[int, int, Sequence[int]]] = (),
    *,
    new: Sequence[NewRow] = (),
    drop: Sequence[int] = (),
) -> StepPlan:
    """Return a plan; ``work`` lists (request id, number of tokens, new blocks)."""
    plan = StepPlan(seq=seq, new_rows=list(new), drop=[RequestId(each) for each in drop])
    for request_id, num_tokens, blocks in work:
        plan.row_ids.append(RequestId(request_id))
        plan.num_tokens.append(num_tokens)
        plan.num_new_blocks.append(len(blocks))
        plan.new_blocks.extend(BlockId(block) for block in blocks)
    return plan


def tokens_of(outcome: StepOutcome, request_id: int) -> tuple[list[int], FinishCode | None]:
    """Return the ids and the finish code of a request in an outcome."""
    ids, start = [], 0
    finish = None
    for each, count, code in zip(outcome.row_ids, outcome.num_tokens, outcome.finish, strict=True):
        if each == request_id:
            ids.extend(outcome.tokens.ids[start : start + count])
            finish = code
        start += count
    return ids, finish
