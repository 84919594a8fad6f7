"""Hundreds of requests through scheduler and engine leave nothing behind."""

from __future__ import annotations

import gc
import random

import torch
from tests.helpers.drive_engine import Answer, serve
from tests.helpers.toy_paged_model import POISON_ID, ToyModel, new_row, pooled, toy_tokenizer

from lorax_contract.pooling import Pooling
from lorax_contract.step import FinishCode, OutputKind, RequestSpec, WarmupSpec
from lorax_router.core.scheduler import Scheduler
from lorax_shard.attention.backend import StepMetadata
from lorax_shard.engine import computation as computation_module
from lorax_shard.engine.engine import Engine
from lorax_shard.engine.memory import PoolSettings
from lorax_shard.sampling.table import KnownSettings

NUM_ROUNDS, ROUND_SIZE = 6, 80
NUM_BLOCKS, MAX_ROWS = 70, 16
POOLINGS = tuple(Pooling)


class QuickModel(ToyModel):
    """Reads no cache: its tokens say nothing, but cost next to nothing."""

    def make_metadata(self, query_lens, context_lens, slots, block_tables, num_decode_rows):
        return StepMetadata(
            query_lens, context_lens, slots, block_tables, num_decode_rows, None, None
        )

    def forward(
        self, input_ids, positions, metadata, logit_rows, slots=(), slot_lens=None, segments=None
    ):
        if (input_ids == POISON_ID).any():
            raise RuntimeError("poison")
        if self._kept is not None:
            self._kept.states = states_of(input_ids)
        generator = torch.Generator().manual_seed(int(input_ids.sum()))
        return torch.randn(len(logit_rows), self.vocab_size, generator=generator)


def states_of(ids: torch.Tensor) -> torch.Tensor:
    """Return what the last layer gives for each token: of itself alone."""
    return torch.sin(ids.float().unsqueeze(1) * torch.arange(1.0, 5.0))


def check_vector(spec: RequestSpec, answer: Answer) -> None:
    """Fail unless a vector that was made is that of its own text, computed alone."""
    if POISON_ID in spec.prompt_ids:
        assert answer.vector is None
        return
    assert answer.error is None
    assert answer.vector is not None
    found = torch.frombuffer(bytearray(answer.vector), dtype=torch.float32)
    expected = pooled(states_of(torch.tensor(spec.prompt_ids)), spec.pooling)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def requests(first: int, rng: random.Random) -> list[RequestSpec]:
    """Return requests that end in every way there is."""
    made = []
    for number in range(first, first + ROUND_SIZE):
        prompt = [rng.randrange(300) for _ in range(rng.randint(1, 40))]
        if number % 50 == 0:
            prompt[-1] = POISON_ID
        sampling = {"do_sample": True, "seed": number, "top_p": 0.9} if number % 3 == 0 else {}
        if number % 7 == 0:
            sampling |= {"num_alternatives": 4, "prompt_logprobs": True}
        if number % 4 == 1:
            # A vector beside them: of one token, of all, or of each.
            kinds = {"pooling": POOLINGS[number // 4 % len(POOLINGS)]}
            made.append(new_row(number, prompt, **kinds).spec)
            continue
        stops = ("e", "th") if number % 5 == 0 else ()
        row = new_row(
            number, prompt, max_new_tokens=rng.randint(1, 30), stop_sequences=stops, **sampling
        )
        made.append(row.spec)
    return made


def test_nothing_grows_with_the_number_of_requests(monkeypatch):
    # Captured records would keep the tracebacks of failed passes.
    monkeypatch.setattr(computation_module.logger, "disabled", True)
    # What is known of rows' parameters has its limit, but more than come here.
    monkeypatch.setattr(KnownSettings.__init__, "__defaults__", (MAX_ROWS,))
    pool = PoolSettings(block_size=4, memory_fraction=0.5, num_blocks=NUM_BLOCKS)
    engine = Engine(QuickModel([5, 60]), toy_tokenizer(), pool)
    engine.warm_up(
        WarmupSpec(max_input_length=40, max_total_tokens=70, max_step_tokens=64, max_rows=MAX_ROWS)
    )
    engine.model.passes = _Nothing()
    scheduler = Scheduler(
        num_blocks=NUM_BLOCKS, block_size=4, max_step_tokens=64, max_rows=MAX_ROWS, depth=2
    )
    rng, counts, finishes = random.Random(1), [], set()
    for number in range(NUM_ROUNDS):
        specs = requests(1 + number * ROUND_SIZE, rng)
        cancelled = [spec.request_id for spec in specs[::11]]
        answers = serve(engine, scheduler, specs, at_once=number % 2 == 0, cancelled=cancelled)
        finishes |= {answer.finish for answer in answers.values()}
        vectors = [spec for spec in specs if spec.output is OutputKind.VECTOR]
        for spec in vectors:
            if spec.request_id not in cancelled:
                check_vector(spec, answers[spec.request_id])
        assert len(vectors) == ROUND_SIZE // 4
        assert len(engine.batch) == 0
        assert scheduler.stats().num_free_blocks == NUM_BLOCKS
        del answers, specs, cancelled, vectors, spec
        gc.collect()
        counts.append(len(gc.get_objects()))
    assert finishes == set(FinishCode)
    assert scheduler.stats().num_preemptions > 0
    assert len(engine.batch.tables) <= 2 * MAX_ROWS
    # The first rounds fill caches; one object a request would be hundreds.
    assert counts[-1] - counts[1] < ROUND_SIZE // 2


class _Nothing(list):
    """Keeps no notes of passes."""

    def append(self, _item: object) -> None:
        return
