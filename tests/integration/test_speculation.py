"""Drafts change how many tokens a step has, and nothing else: bit for bit."""

from __future__ import annotations

import pytest
from tests.helpers.oracle import FREE, Oracle
from tests.integration.test_scheduler_drives_engine import (
    NUM_BLOCKS,
    alone,
    run,
    specs,
    specs_of_other_kinds,
)

from lorax_shard.engine.drafter import Drafter, DraftSettings
from lorax_shard.engine.drafts import DraftPace, MatchCounts


def oracle_of(requests, answers, *, num_wrong_in_ten=2):
    known = [[*spec.prompt_ids, *answers[spec.request_id].tokens.ids] for spec in requests]
    return Oracle(known, num_wrong_in_ten=num_wrong_in_ten)


def drafter_of(oracle, depth, *, max_tokens=3, max_rows=6):
    return Drafter(DraftSettings(max_tokens, max_rows, depth), lambda: oracle, FREE)


@pytest.fixture(
    scope="module", params=[specs, specs_of_other_kinds], ids=lambda each: each.__name__
)
def known(request):
    requests = request.param()
    return requests, {spec.request_id: alone(spec) for spec in requests}


@pytest.mark.parametrize("num_wrong", [0, 3, 10])
@pytest.mark.parametrize("num_host_blocks", [0, 60])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_answers_are_those_without_drafts(known, depth, num_host_blocks, num_wrong):
    requests, answers = known
    oracle = oracle_of(requests, answers, num_wrong_in_ten=num_wrong)
    drafted, num_preemptions = run(
        requests,
        depth=depth,
        num_blocks=NUM_BLOCKS - 3,
        num_host_blocks=num_host_blocks,
        max_step_tokens=16,
        drafter=drafter_of(oracle, depth),
    )
    assert num_preemptions > 0
    assert oracle.num_proposed > 20
    for spec in requests:
        assert drafted[spec.request_id].bits() == answers[spec.request_id].bits()


class Watched(DraftPace):
    """Drafts of a row's own text as if it had eleven tokens, and how many there were."""

    num_drafted = 0

    def propose(self, ids, most):
        return super().propose(ids % 11, most)

    def checked(self, num_drafted, num_kept):
        Watched.num_drafted += num_drafted
        super().checked(num_drafted, num_kept)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_drafts_of_their_own_text_change_no_answer(known, depth):
    """The toy's text is random: nearly all of them are wrong."""
    requests, answers = known
    counts, settings = MatchCounts(), DraftSettings(3, 6, depth)
    Watched.num_drafted = 0
    drafted, num_preemptions = run(
        requests,
        depth=depth,
        num_blocks=NUM_BLOCKS - 3,
        max_step_tokens=16,
        drafter=Drafter(settings, lambda: Watched(counts), FREE),
    )
    assert num_preemptions > 0
    assert Watched.num_drafted > 20
    for spec in requests:
        assert drafted[spec.request_id].bits() == answers[spec.request_id].bits()


@pytest.mark.parametrize("depth", [1, 2])
def test_cancelled_requests_leave_the_others_as_they_are(known, depth):
    requests, answers = known
    cancelled = {spec.request_id for spec in requests[::5]}
    oracle = oracle_of(requests, answers)
    drafted, _ = run(
        requests, depth=depth, cancelled=cancelled, num_blocks=NUM_BLOCKS,
        drafter=drafter_of(oracle, depth),
    )  # fmt: skip
    for spec in requests:
        if spec.request_id not in cancelled:
            assert drafted[spec.request_id].bits() == answers[spec.request_id].bits()
