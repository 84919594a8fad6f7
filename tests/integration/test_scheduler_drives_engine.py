"""The router's scheduler drives the shard's engine: bit for bit, whatever it preempts."""

from __future__ import annotations

import random
from collections import deque

import pytest
from tests.helpers.toy_paged_model import expected_tokens, make_engine, new_row

from lorax_contract.step import FinishCode
from lorax_router.core.scheduler import Scheduler

NUM_BLOCKS = 14


def specs():
    """Return requests of mixed lengths, greedy and seeded."""
    rng = random.Random(8)
    made = []
    for number in range(1, 25):
        prompt = [rng.randrange(1, 300) for _ in range(rng.randrange(1, 20))]
        sampling = {"do_sample": True, "seed": number, "temperature": 1.3} if number % 2 else {}
        row = new_row(number, prompt, max_new_tokens=rng.randrange(1, 18), **sampling)
        made.append(row.spec)
    return made


def serve(requests, *, depth, num_blocks=NUM_BLOCKS, cancelled=(), max_rows=6):
    """Run requests to their end; return tokens and texts by request, and the preemptions."""
    engine = make_engine(num_blocks=num_blocks, eos_token_ids=[5, 60, 61, 62, 63, 64, 65])
    scheduler = Scheduler(
        num_blocks=num_blocks, block_size=4, max_step_tokens=10, max_rows=max_rows, depth=depth
    )
    waiting, flying = deque(requests), deque()
    tokens = {spec.request_id: [] for spec in requests}
    texts = {}
    now = 0.0
    while waiting or flying or not scheduler.is_idle:
        now += 1.0
        if waiting:
            scheduler.submit(waiting.popleft(), now)
        while (plan := scheduler.plan(now)) is not None:
            # Executed now, applied later: the plans between know nothing of its outcome.
            flying.append(engine.step(plan))
        if flying:
            outcome = flying.popleft()
            accepted = scheduler.apply(outcome, now)
            start = 0
            for request_id, count, finish, counts in zip(
                outcome.row_ids, outcome.num_tokens, outcome.finish, accepted, strict=True
            ):
                assert finish != FinishCode.ERROR, outcome.details[request_id]
                if counts:
                    tokens[request_id] += outcome.tokens.ids[start : start + count]
                    if finish != FinishCode.RUNNING:
                        texts[request_id] = outcome.details[request_id].generated_text
                start += count
        for request_id in cancelled:
            if len(tokens[request_id]) == 2:
                scheduler.cancel(request_id)
        scheduler.check()
    assert len(engine.batch) == 0
    return tokens, texts, scheduler.stats().num_preemptions


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_tokens_and_texts_are_those_of_each_request_alone(depth):
    requests = specs()
    tokens, texts, num_preemptions = serve(requests, depth=depth)
    assert num_preemptions > 0
    for spec in requests:
        alone, alone_texts, _ = serve([spec], depth=1, num_blocks=64)
        assert tokens[spec.request_id] == alone[spec.request_id]
        assert texts[spec.request_id] == alone_texts[spec.request_id]
        if not spec.sampling.do_sample:
            count = len(tokens[spec.request_id])
            assert tokens[spec.request_id] == expected_tokens(spec.prompt_ids, count)


@pytest.mark.parametrize("depth", [1, 2])
def test_cancelled_requests_change_nothing_for_the_others(depth):
    requests = specs()
    cancelled = [3, 8, 14]
    whole, texts, _ = serve(requests, depth=1, num_blocks=200)
    tokens, left, _ = serve(requests, depth=depth, cancelled=cancelled)
    for spec in requests:
        if spec.request_id not in cancelled:
            assert tokens[spec.request_id] == whole[spec.request_id]
            assert left[spec.request_id] == texts[spec.request_id]
