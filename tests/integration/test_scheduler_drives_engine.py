"""The router's scheduler drives the shard's engine: bit for bit, whatever it preempts."""

from __future__ import annotations

import random

import pytest
from tests.helpers.drive_engine import serve
from tests.helpers.toy_paged_model import NAN_ID, POISON_ID, expected_tokens, make_engine, new_row

from lorax_contract.step import FinishCode, LogitBias, OutputKind, RequestSpec
from lorax_router.core.scheduler import Scheduler

NUM_BLOCKS = 14
EOS_IDS = (5, 60, 61, 62, 63, 64, 65)
# The toy's texts are random, so that strings this short are met soon.
STOPS = ("a", "th", "e r", "on", "s")


def specs() -> list[RequestSpec]:
    """Return requests of mixed lengths and options: greedy, seeded, stopped, with details."""
    rng = random.Random(8)
    made = []
    for number in range(1, 25):
        prompt = [rng.randrange(1, 300) for _ in range(rng.randrange(1, 20))]
        sampling = {"do_sample": True, "seed": number, "temperature": 1.3} if number % 2 else {}
        if number % 3 == 0:
            sampling |= {"num_alternatives": 3, "prompt_logprobs": True}
        if number % 5 == 0:
            sampling |= {"repetition_penalty": 1.4, "frequency_penalty": 0.5}
        stops = STOPS if number % 4 == 0 else ()
        limit = rng.randrange(1, 18)
        row = new_row(number, prompt, max_new_tokens=limit, stop_sequences=stops, **sampling)
        made.append(row.spec)
    return made


def specs_of_other_kinds() -> list[RequestSpec]:
    """Return requests that ask for their prompt alone, bias their tokens or have a least length."""
    rng = random.Random(9)
    made = []
    for number in range(1, 31):
        prompt = [rng.randrange(1, 300) for _ in range(rng.randrange(1, 20))]
        sampling = {"do_sample": True, "seed": number, "temperature": 1.3} if number % 2 else {}
        if number % 3 == 0:
            sampling |= {"prompt_logprobs": True, "num_prompt_alternatives": 3}
        if number % 4 == 0:
            sampling |= {"logit_bias": LogitBias((5, 60, 9), (4.0, 4.0, -100.0))}
        if number % 5 == 0:
            sampling |= {"raw_logprobs": True, "num_alternatives": 2, "repetition_penalty": 1.2}
        if number % 7 == 0:
            sampling |= {"watermark": True}
        limit = 0 if number % 3 == 0 and number % 2 else rng.randrange(4, 18)
        row = new_row(
            number,
            prompt,
            max_new_tokens=limit,
            min_new_tokens=4 if limit and number % 2 == 0 else 0,
            stop_sequences=STOPS if number % 4 == 0 else (),
            **sampling,
        )
        made.append(row.spec)
    return made


def run(
    requests, *, depth, num_blocks=NUM_BLOCKS, max_step_tokens=10, cancelled=(), num_host_blocks=0,
    drafter=None, **limits,
):  # fmt: skip
    """Return answers by request, and the preemptions; all swapped out for which there is room."""
    engine = make_engine(
        num_blocks=num_blocks,
        eos_token_ids=EOS_IDS,
        num_host_blocks=num_host_blocks,
        drafter=drafter,
    )
    scheduler = Scheduler(
        num_blocks=num_blocks,
        block_size=4,
        max_step_tokens=max_step_tokens,
        max_rows=6,
        depth=depth,
        num_host_blocks=engine.num_host_blocks,
        draft_tokens=3 if drafter is not None else 0,
        **limits,
    )
    answers = serve(engine, scheduler, requests, cancelled=cancelled)
    assert len(engine.batch) == 0
    host = scheduler.stats().host
    assert host.num_held == 0
    assert (host.num_swaps > 0) == (num_host_blocks > 0)
    return answers, scheduler.stats().num_preemptions


def alone(spec: RequestSpec):
    """Return a request's answer on an engine of its own, its prompt in one chunk."""
    return run([spec], depth=1, num_blocks=64, max_step_tokens=64)[0][spec.request_id]


# Steps of 6 tokens end in the middle of blocks, steps of 8 at their ends.
@pytest.mark.parametrize(
    ("max_step_tokens", "num_host_blocks"), [(6, 0), (8, 0), (10, 0), (6, 60), (10, 60), (10, 8)]
)
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_answers_are_those_of_each_request_alone(depth, max_step_tokens, num_host_blocks):
    requests = specs()
    answers, num_preemptions = run(
        requests,
        depth=depth,
        max_step_tokens=max_step_tokens,
        num_host_blocks=num_host_blocks,
    )
    assert num_preemptions > 0
    for spec in requests:
        answer = answers[spec.request_id]
        assert answer.bits() == alone(spec).bits()
        assert answer.error is None
        assert len(answer.alternatives) == (
            len(answer.tokens.ids) if spec.request_id % 3 == 0 else 0
        )
        if spec.sampling.prompt_logprobs:
            assert answer.prompt_tokens.ids == spec.prompt_ids
        if spec.request_id % 5 and not spec.sampling.do_sample:
            ids = answer.tokens.ids
            assert ids == expected_tokens(spec.prompt_ids, len(ids))
    reasons = {answer.finish for answer in answers.values()}
    assert reasons == {FinishCode.LENGTH, FinishCode.EOS_TOKEN, FinishCode.STOP_SEQUENCE}


@pytest.mark.parametrize(
    "limits",
    [
        {"batching": "prefill"},
        {"batching": "decode", "max_waiting_tokens": 3},
        {"max_kv_read": 30},
        {"max_partial_prompts": 2, "target_itl_s": 1e-6},
        {"batching": "prefill", "num_host_blocks": 60},
    ],
    ids=str,
)
@pytest.mark.parametrize("depth", [1, 2])
def test_answers_do_not_depend_on_how_steps_are_composed(depth, limits):
    requests = specs()
    answers, num_preemptions = run(requests, depth=depth, **limits)
    assert num_preemptions > 0
    for spec in requests:
        assert answers[spec.request_id].bits() == alone(spec).bits()


@pytest.mark.parametrize(
    ("max_step_tokens", "num_host_blocks"), [(6, 0), (10, 0), (6, 60), (10, 60)]
)
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_requests_of_other_kinds_are_answered_as_each_alone(
    depth, max_step_tokens, num_host_blocks
):
    requests = specs_of_other_kinds()
    answers, num_preemptions = run(
        requests,
        depth=depth,
        max_step_tokens=max_step_tokens,
        num_host_blocks=num_host_blocks,
    )
    assert num_preemptions > 0
    for spec in requests:
        answer = answers[spec.request_id]
        assert answer.bits() == alone(spec).bits()
        assert answer.error is None
        assert len(answer.tokens.ids) >= spec.stopping.min_new_tokens
        if spec.output is OutputKind.PROMPT:
            assert (answer.tokens.ids, answer.finish) == ([], FinishCode.LENGTH)
            assert (answer.text, answer.tokens.texts) == ("", [])
        if spec.sampling.num_prompt_alternatives:
            assert answer.prompt_tokens.ids == spec.prompt_ids
            counts = [len(each.ids) for each in answer.prompt_alternatives]
            assert counts == [0] + [3] * (len(spec.prompt_ids) - 1)
        if spec.sampling.logit_bias:
            assert 9 not in answer.tokens.ids


@pytest.mark.parametrize("depth", [1, 2])
def test_cancelled_requests_change_nothing_for_the_others(depth):
    requests = specs()
    cancelled = [3, 8, 14]
    answers, _ = run(requests, depth=depth, cancelled=cancelled)
    for spec in requests:
        if spec.request_id not in cancelled:
            assert answers[spec.request_id].bits() == alone(spec).bits()


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize(("bad_id", "words"), [(NAN_ID, "no finite"), (POISON_ID, "poison")])
def test_rows_that_fail_while_others_are_preempted_change_nothing_for_them(depth, bad_id, words):
    requests = specs()
    bad = [
        new_row(100 + at, [*range(1, at + 2), bad_id], max_new_tokens=9).spec for at in (0, 3, 6)
    ]
    answers, num_preemptions = run(
        [*bad[:1], *requests[:12], *bad[1:], *requests[12:]], depth=depth
    )
    assert num_preemptions > 0
    for spec in requests:
        assert answers[spec.request_id].bits() == alone(spec).bits()
    for spec in bad:
        assert answers[spec.request_id].finish is FinishCode.ERROR
        assert words in answers[spec.request_id].error
