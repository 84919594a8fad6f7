"""Requests of all kinds through scheduler and engine, launched as far ahead as plans reach.

The toy model's tokens depend on the request alone, so that answers can be compared bit for bit:
of steps executed one by one, and of steps that are launched before the ones before them are
collected.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from tests.helpers.constraints import choice, regex, schema
from tests.helpers.drive_engine import Answer, serve
from tests.helpers.toy_adapters import SlottedToy, ToyAdapter, ToyPrepared
from tests.helpers.toy_paged_model import (
    BLOCK_SIZE,
    NAN_ID,
    POISON_ID,
    new_row,
    toy_tokenizer,
)

from lorax_contract.step import AdapterHandle, LogitBias, RequestId, RequestSpec, WarmupSpec
from lorax_router.core.adapters.table import AdapterTable
from lorax_router.core.scheduler import Scheduler
from lorax_shard.constraints.setup import constraints_maker
from lorax_shard.engine.drafter import Drafter, DraftSettings
from lorax_shard.engine.engine import Engine
from lorax_shard.engine.memory import PoolSettings
from lorax_shard.sampling.sampler import Sampler, SamplesRows

NUM_BLOCKS, NUM_HOST_BLOCKS, MAX_ROWS, MAX_STEP_TOKENS = 22, 12, 6, 12
NUM_ADAPTERS, NUM_SLOTS = 5, 2
EOS_IDS = (5, 60, 61, 62, 63, 64, 65)
_STOPS = ("a", "th", "e r", "on", "s")
_GRAMMARS = (
    regex("[a-f]{3}-[0-9]{2}"),
    choice("the quick fox", "the dog", "again"),
    schema({"type": "object", "properties": {"a": {"enum": ["xx", "yy"]}}, "required": ["a"]}),
)


def mixed_requests(count: int, seed: int) -> list[RequestSpec]:
    """Return requests that differ in everything that a row can ask for; a few of them fail."""
    rng = random.Random(seed)
    return [_request(number, rng) for number in range(1, count + 1)]


def _request(number: int, rng: random.Random) -> RequestSpec:
    prompt = [rng.randrange(1, 300) for _ in range(rng.randrange(1, 24))]
    fate = rng.random()
    if fate < 0.03:
        prompt[-1] = POISON_ID
    elif fate < 0.06:
        prompt[-1] = NAN_ID
    if rng.random() < 0.4:
        # Text that repeats itself, which drafts come from.
        prompt = (prompt[:6] * 4)[:20]
    options: dict[str, object] = {"max_new_tokens": rng.randrange(1, 24)}
    if rng.random() < 0.5:
        options |= {"do_sample": True, "seed": number, "temperature": rng.choice([0.4, 1.3])}
    for chance, some in (
        (0.2, {"repetition_penalty": 1.3, "frequency_penalty": 0.4}),
        (0.15, {"num_alternatives": 3, "prompt_logprobs": True, "num_prompt_alternatives": 2}),
        (0.15, {"logit_bias": LogitBias((5, 60, 9), (4.0, 4.0, -100.0))}),
        (0.1, {"watermark": True}),
        (0.1, {"min_new_tokens": 3}),
        (0.25, {"stop_sequences": _STOPS}),
        (0.1, {"stop_token_ids": (7, 8, 70, 71)}),
        (0.2, {"constraint": rng.choice(_GRAMMARS)}),
    ):
        options |= some if rng.random() < chance else {}
    spec = new_row(number, prompt, **options).spec
    adapter = rng.choice([0, 0, *range(1, NUM_ADAPTERS + 1)])
    return replace(spec, adapter=AdapterHandle(adapter)) if adapter else spec


class FailingToy(SlottedToy):
    """Some passes of several rows fail, before or after they wrote what they compute."""

    def __init__(self, seed: int) -> None:
        super().__init__(EOS_IDS)
        self._random = random.Random(seed)
        self.share = 0.0
        self.num_failed = 0

    def forward(
        self, input_ids, positions, metadata, logit_rows, slots=(), slot_lens=None, segments=None
    ):
        fate = self._random.random() if len(metadata.query_lens) > 1 else 1.0
        self.num_failed += fate < self.share
        if fate < self.share / 2:
            raise RuntimeError("before")
        logits = super().forward(input_ids, positions, metadata, logit_rows, slots, slot_lens)
        if fate < self.share:
            raise RuntimeError("after")
        return logits


def overlapped_world(
    depth: int, *, drafts: bool, method: SamplesRows | None = None, failing: float = 0.0
) -> tuple[Engine, Scheduler]:
    """Return an engine and a scheduler that preempts, swaps and takes turns with adapters.

    ``method``: how the engine draws; None: as it does by itself. ``failing``: of passes.
    """
    lane = ToyPrepared()
    table = AdapterTable(max_resident=NUM_SLOTS, cycle_time_s=4.0)
    for number in range(1, NUM_ADAPTERS + 1):
        lane[AdapterHandle(number)] = ToyAdapter(favourite=80 + number, bonus=6.0)
        table.add(AdapterHandle(number), 1)
    pool = PoolSettings(
        block_size=BLOCK_SIZE, memory_fraction=0.5, num_blocks=NUM_BLOCKS,
        swap_bytes=NUM_HOST_BLOCKS * 16 * BLOCK_SIZE,
    )  # fmt: skip
    drafter = Drafter(DraftSettings(max_tokens=3, max_rows=4, max_depth=depth)) if drafts else None
    model = FailingToy(seed=depth)
    engine = Engine(
        model, toy_tokenizer(), pool, adapters=lane, drafter=drafter,
        make_constraints=constraints_maker(toy_tokenizer(), model.vocab_size, EOS_IDS),
    )  # fmt: skip
    if method is not None:
        engine.computation.sampler = Sampler(model.vocab_size, method=method)
    engine.warm_up(
        WarmupSpec(max_input_length=32, max_total_tokens=64, max_step_tokens=32, max_rows=MAX_ROWS)
    )
    model.share = failing
    scheduler = Scheduler(
        num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, max_step_tokens=MAX_STEP_TOKENS,
        max_rows=MAX_ROWS, depth=depth, adapters=table, num_host_blocks=engine.num_host_blocks,
        draft_tokens=3 if drafts else 0,
    )  # fmt: skip
    return engine, scheduler


def answered(
    requests: Sequence[RequestSpec],
    depth: int,
    *,
    drafts: bool,
    cancelled: Sequence[int] = (),
    method: SamplesRows | None = None,
    failing: float = 0.0,
) -> tuple[dict[RequestId, Answer], Scheduler]:
    """Serve the requests; return what each was given, and the scheduler when all is over."""
    engine, scheduler = overlapped_world(depth, drafts=drafts, method=method, failing=failing)
    answers = serve(engine, scheduler, requests, cancelled=[RequestId(each) for each in cancelled])
    assert len(engine.batch) == 0
    assert not engine.computation.interrupted
    assert (engine.model.num_failed > failing * len(requests)) == (failing > 0)
    return answers, scheduler
