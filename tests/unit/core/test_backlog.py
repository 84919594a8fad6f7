"""How much may wait: limits of tenants and of all, and what whoever is refused is told."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.helpers.core_world import CoreWorld

from lorax_contract.errors import BusyError, QueueFullError, ValidationError
from lorax_contract.step import RequestId
from lorax_router.core.backlog import LEAST_RETRY_S, MOST_RETRY_S, DrainRate
from lorax_router.core.policies.fair import FairShare
from lorax_router.core.request import RequestTerms
from lorax_router.core.tenant_limits import TenantLimits


def terms(tenant: str, **limits: int) -> RequestTerms:
    return RequestTerms(tenant, limits=TenantLimits(**limits))


def world(**options: int) -> CoreWorld:
    return CoreWorld(FairShare(), max_rows=1, **options)


def test_a_tenant_has_no_more_waiting_than_it_may_and_others_are_served() -> None:
    it = world()
    flood = terms("flood", queued_requests=3)
    for _ in range(3):
        it.submit(flood)
    with pytest.raises(QueueFullError, match="3 requests of yours wait"):
        it.submit(flood)
    it.submit(terms("other", queued_requests=3))
    # What runs does not wait any more.
    it.step()
    it.submit(flood)
    it.run_until_idle()
    assert len(it.ended) == 5


def test_tokens_that_wait_are_prompts_and_the_most_that_may_follow() -> None:
    it = world()
    few = terms("few", queued_tokens=100)
    it.submit(few, num_prompt=40, max_new=50)
    it.submit(few, num_prompt=5, max_new=5)
    with pytest.raises(QueueFullError, match="100 tokens of yours wait"):
        it.submit(few, num_prompt=1, max_new=1)


def test_what_never_fits_into_the_queue_is_no_matter_of_time() -> None:
    it = world()
    with pytest.raises(ValidationError, match="51 tokens.*at most 50"):
        it.submit(terms("few", queued_tokens=50), num_prompt=41, max_new=10)
    with pytest.raises(ValidationError, match="3 sequences.*at most 2"):
        it.scheduler.backlog.check(terms("few", queued_requests=2), 3, 0, it.now)


def test_sequences_that_come_together_find_place_together_or_not_at_all() -> None:
    it = world()
    two = terms("two", queued_requests=2)
    it.submit(two)
    with pytest.raises(QueueFullError):
        it.scheduler.backlog.check(two, 2, 0, it.now)
    it.scheduler.backlog.check(two, 1, 0, it.now)


def test_all_together_have_no_more_waiting_than_may() -> None:
    it = world(max_queued_requests=2)
    it.submit(terms("a"))
    it.submit(terms("b"))
    with pytest.raises(BusyError) as refused:
        it.submit(terms("c"))
    assert refused.value.kind.http_status == 503
    assert refused.value.kind.retry_after_s is not None


def test_a_preempted_request_is_not_counted_again() -> None:
    it = CoreWorld(FairShare(), num_blocks=4, max_rows=4)
    one = terms("one", queued_requests=1)
    it.submit(one, num_prompt=4, num_output=9)
    it.step()
    it.submit(one, num_prompt=4, num_output=9)
    it.run_until_idle()
    assert sum(it.num_preemptions.values()) > 0
    assert len(it.ended) == 2


def test_whoever_gives_up_leaves_its_place() -> None:
    it = world()
    one = terms("one", queued_requests=1)
    it.submit(terms("other"))
    it.step()
    number = it.submit(one)
    it.scheduler.cancel(RequestId(number))
    it.submit(one)


def test_who_is_refused_is_told_to_come_back_when_the_queue_is_through() -> None:
    it = world()
    flood = terms("flood", queued_requests=20)
    # Each request takes four steps of a second, one at a time.
    for _ in range(40):
        it.step(4)
        while True:
            try:
                it.submit(flood, num_output=4)
            except QueueFullError as error:
                refused = error
                break
    seconds = refused.kind.retry_after_s
    assert seconds == MOST_RETRY_S  # 20 requests in 80 seconds, which is more than is ever told
    it.step(4 * 12)
    with pytest.raises(QueueFullError) as refused_later:
        it.scheduler.backlog.check(flood, 13, 0, it.now)
    later = refused_later.value.kind.retry_after_s
    assert later is not None and 0.75 * 32 <= later <= 1.25 * 32


@given(
    st.lists(st.tuples(st.integers(1, 50), st.floats(0.0, 5.0)), max_size=20),
    st.integers(1, 50),
    st.integers(1, 50),
    st.integers(1, 5_000),
    st.integers(0, 5_000),
)
def test_retry_after_never_falls_as_the_queue_grows(
    admissions: list[tuple[int, float]], requests: int, more_requests: int, tokens: int, more: int
) -> None:
    rate = DrainRate()
    rate.starts(0.0)
    now = 0.0
    for num_tokens, pause in admissions:
        now += pause
        rate.admitted(num_tokens, now)
    few = rate.seconds_to_drain(requests, tokens, now)
    assert 0.0 < few <= rate.seconds_to_drain(requests, tokens + more, now) * (1 + 1e-9)
    assert few <= rate.seconds_to_drain(requests + more_requests, tokens, now) * (1 + 1e-9)


def test_a_queue_that_stands_still_is_told_to_take_ever_longer() -> None:
    rate = DrainRate()
    rate.starts(0.0)
    for second in range(30):
        rate.admitted(10, float(second))
    waits = [rate.seconds_to_drain(10, 100, float(now)) for now in (30, 60, 120, 240)]
    assert waits == sorted(waits)
    assert waits[0] < 15 < MOST_RETRY_S < waits[-1]


def test_an_idle_hour_does_not_change_what_is_known() -> None:
    rate = DrainRate()
    rate.starts(0.0)
    for second in range(1, 31):
        rate.admitted(10, float(second))
    rate.stops(30.0)
    before = rate.seconds_to_drain(10, 100, 30.0)
    rate.starts(3_630.0)
    assert rate.seconds_to_drain(10, 100, 3_630.0) == pytest.approx(before)
    assert LEAST_RETRY_S <= before <= MOST_RETRY_S


def test_to_be_asked_changes_nothing() -> None:
    """What is only asked is in no log of events: a replay must not miss it."""
    asked, other = DrainRate(), DrainRate()
    for rate in (asked, other):
        rate.starts(0.0)
        rate.admitted(10, 1.0)
    for moment in range(1, 100):
        asked.seconds_to_drain(3, 30, 1.0 + moment / 7)
        asked.requests_per_s(1.0 + moment / 7)
    for rate in (asked, other):
        rate.admitted(10, 20.0)
    assert asked.seconds_to_drain(3, 30, 21.0) == other.seconds_to_drain(3, 30, 21.0)
