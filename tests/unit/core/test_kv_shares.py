"""Shares of the KV cache: soft, of rows and cached prefixes together."""

from __future__ import annotations

import pytest
from tests.helpers.core_world import CoreWorld

from lorax_router.core.blocks import BlockPool
from lorax_router.core.policies.fair import FairShare
from lorax_router.core.policies.policy import SchedulingPolicy
from lorax_router.core.policies.priority import StrictPriority
from lorax_router.core.prefix import BlockNames, PrefixIndex
from lorax_router.core.request import RequestTerms
from lorax_router.core.tenant_limits import TenantLimits

# Of a pool of 40 blocks of 4 tokens.
NUM_BLOCKS = 40
HALF = TenantLimits(kv_share=0.5)


def terms(tenant: str, limits: TenantLimits = HALF, priority: int = 0) -> RequestTerms:
    return RequestTerms(tenant, priority=priority, limits=limits)


def world(policy: SchedulingPolicy | None = None, **values: int) -> CoreWorld:
    return CoreWorld(
        FairShare() if policy is None else policy,
        **{"num_blocks": NUM_BLOCKS, "max_rows": 8, **values},  # type: ignore[arg-type]
    )


def num_held(it: CoreWorld, tenant: str) -> int:
    return it.scheduler._running.pool.tenants._numbers[tenant]


def cached_again(it: CoreWorld, number: int, tenant: RequestTerms) -> int:
    """Return how many tokens of an earlier prompt are still there."""
    running = it.scheduler._running
    before = running.num_cached_tokens
    again = it.submit(tenant, num_prompt=16, num_output=1, start=10_000 * number)
    it.run_until_idle()
    assert again in it.ended
    return running.num_cached_tokens - before


@pytest.mark.parametrize("limits", [HALF, TenantLimits()])
def test_prefixes_of_who_has_too_many_go_first(limits: TenantLimits) -> None:
    it = world(max_rows=1)
    bee = it.submit(terms("bee"), num_prompt=16, num_output=1)
    it.run_until_idle()
    for _ in range(20):
        it.submit(terms("ant", limits), num_prompt=16, num_output=1)
        it.run_until_idle()
    kept = cached_again(it, bee, terms("bee"))
    # All but the last token's block; without a share the oldest went first.
    assert kept == (12 if limits is HALF else 0)


def test_what_nobody_else_wants_is_lent() -> None:
    it = world()
    for _ in range(4):
        it.submit(terms("ant"), num_prompt=32, num_output=8)
    it.step(3)
    assert num_held(it, "ant") > NUM_BLOCKS // 2
    assert not it.num_preemptions


def test_rows_of_who_has_too_much_give_way_to_who_is_within_its_share() -> None:
    it = world()
    ants = [it.submit(terms("ant"), num_prompt=28, num_output=60, max_new=60) for _ in range(4)]
    # A row of its own, so that sharing rows is not what helps it.
    first = it.submit(terms("bee"), num_prompt=4, num_output=40)
    it.step(4)
    bee = it.submit(terms("bee"), num_prompt=60, num_output=4)
    it.step(8)
    assert bee in it.admitted
    # And of all that gave way, none is lost.
    it.run_until_idle()
    assert {*ants, bee, first} == it.ended.keys()


def test_without_a_share_it_waits_for_a_row_to_end() -> None:
    none = TenantLimits()
    it = world()
    for _ in range(4):
        it.submit(terms("ant", none), num_prompt=28, num_output=60, max_new=60)
    it.submit(terms("bee", none), num_prompt=4, num_output=40)
    it.step(4)
    bee = it.submit(terms("bee", none), num_prompt=60, num_output=4)
    it.step(8)
    assert bee not in it.admitted


def test_nobody_gives_way_to_who_would_have_too_much_itself() -> None:
    it = world()
    for _ in range(4):
        it.submit(terms("ant"), num_prompt=28, num_output=60, max_new=60)
    it.submit(terms("bee"), num_prompt=4, num_output=40)
    it.step(4)
    bee = it.submit(terms("bee", TenantLimits(kv_share=0.1)), num_prompt=32, num_output=4)
    it.step(8)
    assert bee not in it.admitted


def test_better_classes_do_not_give_way_to_worse_ones_whatever_the_shares() -> None:
    it = world(StrictPriority())
    ants = [
        it.submit(terms("ant", priority=-1), num_prompt=28, num_output=20, max_new=20)
        for _ in range(4)
    ]
    it.step(4)
    it.submit(terms("bee"), num_prompt=32, num_output=4)
    it.step(8)
    assert not any(each in it.num_preemptions for each in ants[:1])
    it.run_until_idle()


def test_where_tenants_share_prefixes_a_chain_still_loses_its_last_block_first() -> None:
    """A chain is several tenants' then: none of its blocks may go before those behind it."""
    pool = BlockPool(4, PrefixIndex(BlockNames(4), is_shared=True))
    pool.tenants.allow("ant", 0.1)
    pool.take(4, "ant")
    assert pool.tenants.excess("ant") > 0
    assert pool.tenants.victim() is None
