"""Rounds over ordered queues, against a plain sort of all that wait."""

from __future__ import annotations

import random

import pytest

from lorax_contract.step import (
    AdapterHandle,
    RequestId,
    RequestSpec,
    SamplingParams,
    StoppingParams,
)
from lorax_router.core.policies.heads import OrderedQueues
from lorax_router.core.request import RequestState, rank_of


def request_of(order: int, adapter: int, rank: float) -> RequestState:
    """Return a request of a rank."""
    spec = RequestSpec(
        request_id=RequestId(order), prompt_ids=[1], sampling=SamplingParams(),
        stopping=StoppingParams(max_new_tokens=1), adapter=AdapterHandle(adapter),
    )  # fmt: skip
    request = RequestState(spec, order, 0.0)
    request.rank = rank
    return request


@pytest.mark.parametrize("seed", range(20))
def test_a_round_names_all_that_it_may_in_order_of_rank(seed: int) -> None:
    """Whatever was deferred or admitted before, of whichever queue."""
    draw = random.Random(seed)
    queues = OrderedQueues()
    waiting: dict[RequestState, int] = {}
    order = 0
    for _ in range(30):
        for _ in range(draw.randrange(12)):
            order += 1
            request = request_of(order, draw.randrange(5), float(draw.randrange(-2, 3)))
            waiting[request] = draw.randrange(3)
            queues.push(request, waiting[request])
        for request in draw.sample(list(waiting), draw.randint(0, min(3, len(waiting)))):
            queues.remove(request, waiting.pop(request))
        adapters = {AdapterHandle(each) for each in range(5) if draw.random() < 0.6}
        expected = sorted((each for each in waiting if each.spec.adapter in adapters), key=rank_of)
        queues.begin(adapters)
        for request in expected[: draw.randint(0, len(expected))]:
            assert queues.head() is request
            if draw.random() < 0.5:
                queues.defer(request, waiting[request])
            else:
                queues.remove(request, waiting.pop(request))
        assert len(queues) == len(waiting)


def test_a_round_goes_on_behind_a_request_that_was_named_out_of_turn() -> None:
    """Nobody is named twice, and nobody before it is left out."""
    queues = OrderedQueues()
    first, second, third = (
        request_of(number, number, rank) for number, rank in ((1, 0.0), (2, 1.0), (3, 2.0))
    )
    for request, group in ((first, 0), (second, 1), (third, 2)):
        queues.push(request, group)
    queues.begin([AdapterHandle(each) for each in range(4)])
    assert set(queues.worse(0)) == {second, third}
    queues.defer(third, 2)
    assert list(queues.worse(0)) == [second]
    for request, group in ((first, 0), (second, 1)):
        assert queues.head() is request
        queues.defer(request, group)
    assert queues.head() is None
