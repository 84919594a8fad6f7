"""What other replicas gave tenants counts where they wait."""

from __future__ import annotations

import pytest
from tests.helpers.core_world import CoreWorld

from lorax_contract.config import SCHEDULING_POLICIES
from lorax_router.core.policies.fair import FairShare
from lorax_router.core.policies.shares import Shares
from lorax_router.core.request import RequestTerms

A, B = RequestTerms("a"), RequestTerms("b", weight=2.0)


def flooded() -> CoreWorld:
    world = CoreWorld(FairShare())
    for _ in range(100):
        world.submit(A, num_output=8)
        world.submit(B, num_output=8)
    return world


def test_who_got_more_elsewhere_gets_less_here() -> None:
    plain, told = flooded(), flooded()
    for _ in range(6):
        plain.step(5)
        told.step(5)
        told.scheduler.served_elsewhere({"a": 40.0})
    assert told.tokens_of("a") < plain.tokens_of("a")
    assert told.tokens_of("b") > plain.tokens_of("b")


def test_what_is_reported_is_what_was_got_here() -> None:
    """Neither what others gave nor what a counter was lifted by: or it would come back as news."""
    world = flooded()
    world.step(20)
    before = dict(world.scheduler.service_here())
    assert min(before.values()) > 0
    world.scheduler.served_elsewhere({"a": 1000.0, "nobody": 5.0})
    assert world.scheduler.service_here() == {**before, "nobody": 0.0}
    late = RequestTerms("late")
    world.submit(late, num_output=8)
    assert world.scheduler.service_here()["late"] == pytest.approx(0.0)


@pytest.mark.parametrize("policy", SCHEDULING_POLICIES)
def test_all_policies_can_be_told(policy: str) -> None:
    from tests.helpers.logged_core import small_settings

    from lorax_router.core.settings import make_scheduler

    scheduler = make_scheduler(small_settings(policy))
    scheduler.served_elsewhere({"a": 10.0})
    assert sum(scheduler.service_here().values()) == 0.0


def test_idle_members_that_are_forgotten_take_their_grants_with_them() -> None:
    shares: Shares[int] = Shares()
    for member in range(3000):
        shares.joins(member)
        shares.charge(member, 1.0)
        shares.grant(member, 1.0)
        shares.leaves(member)
    assert len(shares) < 3000
    assert set(shares._granted) <= set(shares._service)
    assert all(amount == pytest.approx(1.0) for amount in shares.earned().values())
