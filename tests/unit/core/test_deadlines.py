"""Requests that are too late, or that will be whatever happens, end early and say why."""

from __future__ import annotations

import dataclasses
import math

import pytest
from tests.helpers.core_world import CoreWorld

from lorax_contract.errors import DeadlineError
from lorax_contract.step import RequestId
from lorax_router.core.deadlines import ComputeRate
from lorax_router.core.policies.fair import FairShare
from lorax_router.core.policies.policy import SchedulingPolicy
from lorax_router.core.policies.shortest import ShortestFirst
from lorax_router.core.request import RequestTerms

ANY = RequestTerms("tenant")


def until(deadline: float, tenant: str = "tenant") -> RequestTerms:
    return RequestTerms(tenant, deadline=deadline)


def busy_world(policy: SchedulingPolicy | None = None, waiting: int = 60) -> CoreWorld:
    """One request a second, as is known by now, and ``waiting`` requests before any other."""
    world = CoreWorld(FairShare() if policy is None else policy, max_rows=1)
    for _ in range(waiting + 12):
        world.submit(ANY, num_output=1)
    world.step(12)
    return world


def test_a_request_whose_time_is_over_is_not_queued() -> None:
    world = CoreWorld(FairShare())
    world.step()
    with pytest.raises(DeadlineError, match="time that the client gave it is over"):
        world.submit(until(world.now))
    assert world.scheduler.is_idle


def test_who_waits_behind_too_many_hears_so_at_once() -> None:
    world = busy_world()
    # 60 requests take 60 seconds; even twice as fast, and with some passed, it is too late.
    with pytest.raises(DeadlineError, match="its first token is at least .* s away"):
        world.submit(until(world.now + 20.0))
    world.scheduler.check()


def test_who_may_still_be_in_time_waits() -> None:
    world = busy_world()
    number = world.submit(until(world.now + 70.0), num_output=1)
    world.run_until_idle()
    assert number in world.ended and not world.late


def test_a_waiting_request_ends_before_its_deadline_once_it_cannot_meet_it() -> None:
    world = busy_world()
    deadline = world.now + 40.0
    number = world.submit(until(deadline))
    assert number not in world.late
    # Another tenant comes, and half of what is served is its own.
    for _ in range(60):
        world.submit(RequestTerms("other"), num_output=1)
    for _ in range(60):
        world.step(number not in world.late)
    assert world.now < deadline - 5.0
    assert "its first token is at least" in world.late[number]


def test_no_rate_no_forecast_only_the_deadline_itself() -> None:
    world = CoreWorld(FairShare(), max_rows=1)
    for _ in range(100):
        world.submit(ANY, num_output=1_000, max_new=1_000)
    number = world.submit(until(50.0))
    world.step(49)
    assert not world.late
    world.step(2)
    assert list(world.late) == [number]
    assert "is over" in world.late[number]


def test_where_the_order_is_not_that_of_arrival_only_its_own_prompt_counts() -> None:
    world = busy_world(ShortestFirst())
    world.submit(until(world.now + 10.0))


def test_a_running_request_ends_at_its_deadline() -> None:
    world = CoreWorld(FairShare())
    number = world.submit(until(5.0), num_output=100)
    other = world.submit(ANY, num_output=10)
    world.step(12)
    assert list(world.late) == [number]
    assert world.tokens[number] <= 6
    assert other in world.ended
    assert world.scheduler.is_idle


def test_what_ends_is_told_once_and_frees_what_it_held() -> None:
    world = CoreWorld(FairShare(), num_blocks=10)
    number = world.submit(until(3.0), num_prompt=20, num_output=10)
    world.step(3)
    plan = world.scheduler.plan(3.0)
    assert plan is not None and number in plan.drop
    assert list(world.scheduler.deadlines.take_late()) == [number]
    assert world.scheduler.deadlines.take_late() == {}
    assert not world.scheduler.cancel(RequestId(number))


def test_a_prompt_that_takes_longer_than_is_left_is_not_begun() -> None:
    world = CoreWorld(FairShare(), max_step_tokens=16, num_blocks=1_000)
    world.submit(ANY, num_prompt=64, num_output=1)
    world.run_until_idle()
    with pytest.raises(DeadlineError):
        # At 16 tokens a second.
        world.submit(until(world.now + 9.0), num_prompt=160)
    world.submit(until(world.now + 11.0), num_prompt=160)


def test_only_steps_that_are_half_full_make_the_rate_fall() -> None:
    rate = ComputeRate(512)
    assert rate.seconds_for(1_000) == 0.0
    rate.step_done(512, 0.1)
    before = rate.seconds_for(512)
    for _ in range(1_000):
        rate.step_done(32, 0.1)
    assert rate.seconds_for(512) == before
    for _ in range(100):
        rate.step_done(300, 0.1)
    assert rate.seconds_for(300) == pytest.approx(0.1)
    rate.step_done(0, 0.1)
    rate.step_done(300, 0.0)


def test_terms_have_no_deadline_unless_one_is_given() -> None:
    assert dataclasses.asdict(ANY)["deadline"] == math.inf
