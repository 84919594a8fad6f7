"""Fair shares between tenants and between adapters, on a scheduler that runs."""

from __future__ import annotations

import pytest
from tests.helpers.core_world import CoreWorld

from lorax_router.core.adapters.table import AdapterTable
from lorax_router.core.policies.displacement import LOST_TO_TENANTS
from lorax_router.core.policies.fair import LOAD_CHARGE, OUTPUT_WEIGHT, FairShare
from lorax_router.core.policies.shares import Shares
from lorax_router.core.request import RequestTerms

A, B = RequestTerms("a"), RequestTerms("b")


def test_a_flood_of_one_tenant_halves_its_share_and_no_more() -> None:
    """Ten requests for each one of the other's: both get the same while both wait."""
    world = CoreWorld(FairShare())
    for _ in range(100):
        world.submit(A, num_output=8)
    for _ in range(20):
        world.submit(B, num_output=8)
    world.step(60)
    got = world.tokens_of("a"), world.tokens_of("b")
    # A row's output at most lies between two that are equally entitled.
    assert abs(got[0] - got[1]) <= 4 * 8, got


def test_a_tenant_with_many_adapters_gets_no_more_than_one_with_one() -> None:
    """Shares go by tenant first: adapters only divide what a tenant gets."""
    world = CoreWorld(FairShare(load_charge=0.0))
    for number in range(50):
        world.submit(A, num_output=8, adapter=1 + number)
    for _ in range(50):
        world.submit(B, num_output=8, adapter=60)
    world.step(50)
    got = world.tokens_of("a"), world.tokens_of("b")
    assert abs(got[0] - got[1]) <= 4 * 8, got


def test_adapters_of_one_tenant_share_alike() -> None:
    """Without keys everybody is one tenant, and the adapters are told apart."""
    world = CoreWorld(FairShare(load_charge=0.0))
    nobody = RequestTerms()
    first = [world.submit(nobody, num_output=8, adapter=1) for _ in range(60)]
    second = [world.submit(nobody, num_output=8, adapter=2) for _ in range(20)]
    world.step(50)
    got = world.tokens_of("", first), world.tokens_of("", second)
    assert abs(got[0] - got[1]) <= 4 * 8, got


def test_weights_divide_the_service() -> None:
    """Three times the weight, three times the tokens."""
    world = CoreWorld(FairShare())
    heavy = RequestTerms("heavy", weight=3.0)
    for _ in range(100):
        world.submit(A, num_output=8)
        world.submit(heavy, num_output=8)
    world.step(80)
    ratio = world.tokens_of("heavy") / world.tokens_of("a")
    assert 2.5 < ratio < 3.5


def test_being_idle_earns_no_credit() -> None:
    """Whoever comes late shares from then on; it is not paid for the time before."""
    world = CoreWorld(FairShare())
    for _ in range(200):
        world.submit(A, num_output=8)
    world.step(100)
    before = world.tokens_of("a")
    for _ in range(100):
        world.submit(B, num_output=8)
    world.step(60)
    got = world.tokens_of("a") - before, world.tokens_of("b")
    assert abs(got[0] - got[1]) <= 2 * 4 * 8, got


def test_a_deferred_head_lets_few_pass_and_then_all_wait() -> None:
    """The least served tenant's large request enters after a bounded number of others."""
    world = CoreWorld(FairShare(max_bypasses=2), num_blocks=8, max_rows=4)
    small = [world.submit(A, num_prompt=4, num_output=9) for _ in range(2)]
    world.step()
    large = world.submit(B, num_prompt=24, num_output=4)
    later = [world.submit(A, num_prompt=1, num_output=3) for _ in range(12)]
    world.run_until_idle()
    passed = [each for each in later if world.admitted[each] < world.admitted[large]]
    assert len(passed) <= 2
    assert max(world.ended[each] for each in small) <= world.admitted[large]


def test_what_was_never_computed_is_paid_back() -> None:
    """A request that leaves the queue costs nothing; one that leaves in its prompt costs what ran."""
    policy = FairShare()
    world = CoreWorld(policy, max_step_tokens=16)
    running = world.submit(A, num_prompt=64)
    world.step(1)
    assert policy.service("a") == 64
    waiting = world.submit(A, num_prompt=64)
    assert world.scheduler.cancel(waiting)
    assert policy.service("a") == 64
    assert world.scheduler.cancel(running)
    assert policy.service("a") == 16


def test_computing_again_is_free() -> None:
    """A pool that makes rows give way charges what the same requests cost without."""
    charged = []
    for num_blocks in (1000, 9):
        policy = FairShare()
        world = CoreWorld(policy, num_blocks=num_blocks)
        for _ in range(4):
            world.submit(A, num_prompt=4, num_output=20)
        world.run_until_idle()
        charged.append(policy.service("a"))
        preemptions = world.scheduler.stats().num_preemptions
    assert preemptions > 0
    assert charged == [4 * (4 + 20 * OUTPUT_WEIGHT)] * 2


def test_bringing_an_adapter_is_charged_to_whoever_waits_for_it() -> None:
    """A flood of cold adapters is not free."""
    policy = FairShare()
    world = CoreWorld(policy)
    world.submit(A, num_prompt=4, num_output=1, adapter=1)
    world.run_until_idle()
    assert policy.service("a") == LOAD_CHARGE + 4 + OUTPUT_WEIGHT


def test_the_line_of_adapters_is_fair_too() -> None:
    """Fifty cold adapters of one tenant do not go before the one of another."""
    world = CoreWorld(FairShare(), adapters=AdapterTable(max_resident=2, cycle_time_s=4.0))
    for number in range(50):
        world.submit(A, num_output=4, adapter=1 + number)
    world.step()
    only = world.submit(B, num_output=4, adapter=60)
    world.run_until_idle()
    ends = sorted(world.ended.values())
    # Two came before it was there; at most one more does.
    assert ends.index(world.ended[only]) <= 3


def test_a_tenant_whose_adapter_is_on_its_way_goes_first_once_it_is_there() -> None:
    """It keeps its counter while others are served in its place."""
    policy = FairShare(load_charge=0.0)
    adapters = AdapterTable(max_resident=1, cycle_time_s=30.0)
    world = CoreWorld(policy, adapters=adapters, max_rows=2)
    for _ in range(40):
        world.submit(A, num_output=4)
    world.step(3)
    cold = [world.submit(B, num_output=4, adapter=1) for _ in range(4)]
    world.step(1)
    assert not world.admitted.keys() & set(cold)
    world.run_until_idle()
    overtaken = [
        each for each, at in world.admitted.items()
        if world.terms[each] == A and world.now > at > min(world.admitted[c] for c in cold)
    ]  # fmt: skip
    assert overtaken, "the other tenant had nothing left"
    assert max(world.admitted[c] for c in cold) - min(world.admitted[c] for c in cold) <= 12


class TestShares:
    """The counters alone."""

    def test_a_member_that_joins_is_lifted_to_the_least_of_those_that_wait(self) -> None:
        """Not to the most, and never down."""
        shares: Shares[str] = Shares()
        for name, service in (("a", 10.0), ("b", 30.0)):
            shares.joins(name)
            shares.charge(name, service)
        shares.joins("c")
        assert shares["c"] == 10.0
        shares.leaves("b")
        shares.joins("b")
        assert shares["b"] == 40.0

    def test_where_nobody_waits_the_last_one_that_did_counts(self) -> None:
        """So that two which take turns keep their account."""
        shares: Shares[str] = Shares()
        shares.joins("a")
        shares.leaves("a")
        shares.charge("a", 50.0)
        shares.joins("b")
        assert shares["b"] == 50.0

    @pytest.mark.parametrize("num", [10_000])
    def test_those_long_gone_are_forgotten_and_debts_are_not(self, num: int) -> None:
        """Memory follows those that wait."""
        shares: Shares[int] = Shares()
        shares.joins(-1)
        shares.charge(-1, 5.0)
        shares.joins(-2)
        shares.charge(-2, 100.0)
        shares.leaves(-2)
        for number in range(num):
            shares.joins(number)
            shares.leaves(number)
        assert shares[-2] == 105.0
        assert len(shares) < 2_000


def test_a_tenant_without_a_row_gets_one_at_once() -> None:
    """Under a flood with long outputs it does not wait for one of them to end."""
    world = CoreWorld(FairShare(), max_rows=4)
    for _ in range(40):
        world.submit(A, num_output=500)
    world.step(20)
    victim = world.submit(B)
    world.step(2)
    assert world.admitted[victim] <= 21.0
    assert world.scheduler.stats().num_preemptions == 1


def test_an_adapter_without_a_row_gets_one_from_its_own_tenant_only() -> None:
    """Without keys adapters are told apart the same way; other tenants pay nothing for it."""
    world = CoreWorld(FairShare(load_charge=0.0), max_rows=4)
    first = [world.submit(A, num_output=500, adapter=1) for _ in range(20)]
    world.step(3)
    world.submit(B, num_output=500)
    world.step(20)
    world.num_preemptions.clear()
    second = world.submit(A, adapter=2)
    world.step(6)
    assert second in world.admitted
    world.run_until_idle()
    assert world.num_preemptions
    assert set(world.num_preemptions) <= set(first)


def test_giving_way_comes_to_rest() -> None:
    """More tenants than rows, all with long requests: each gives way a few times at most."""
    world = CoreWorld(FairShare(), max_rows=3)
    for number in range(6):
        for _ in range(3):
            world.submit(RequestTerms(f"tenant {number}"), num_output=60)
    world.run_until_idle()
    assert set(world.tokens.values()) == {60}
    assert max(world.num_preemptions.values(), default=0) <= 3


def test_a_tenant_keeps_a_row_when_many_come() -> None:
    """Those that come take what it has beyond that, and it takes nothing back."""
    world = CoreWorld(FairShare(), max_rows=4, num_blocks=60)
    for _ in range(10):
        world.submit(A, num_output=100)
    world.step(10)
    others = [world.submit(RequestTerms(f"tenant {each}"), num_output=100) for each in range(8)]
    world.step(4)
    assert sum(each in world.admitted for each in others) == 3
    assert world.scheduler.stats().num_preemptions == 3
    world.step(50)
    assert world.scheduler.stats().num_preemptions == 3


def test_giving_way_costs_little_of_what_is_computed() -> None:
    """However many come and find no row of theirs: what is lost to them is bounded."""
    world = CoreWorld(FairShare(), max_rows=2, max_step_tokens=512, num_blocks=200)
    for _ in range(100):
        world.submit(A, num_prompt=256, num_output=40)
    for number in range(150):
        world.submit(RequestTerms(f"tenant {number}"), num_output=2)
        world.step(6)
    num = sum(world.num_preemptions.values())
    computed = 256 * (len(world.admitted) + num) + sum(world.tokens.values())
    # What runs at once pays for the first ones, a share of what is computed for the others.
    assert 0 < num * 256 <= 2 * 300 + LOST_TO_TENANTS * computed


def test_asking_who_would_give_way_costs_nothing() -> None:
    """A request too large for what others could free spends no allowance, however often it asks."""
    world = CoreWorld(FairShare(), num_blocks=40, max_rows=4)
    for _ in range(3):
        world.submit(A, num_prompt=40, num_output=60)
    world.step(5)
    # More than the pool has beside A's oldest row, which it keeps.
    large = world.submit(B, num_prompt=130, num_output=4)
    world.step(5)
    assert world.scheduler.stats().num_preemptions == 0
    assert world.scheduler.cancel(large)
    small = world.submit(B, num_prompt=40)
    world.step(2)
    assert small in world.admitted
    assert world.scheduler.stats().num_preemptions == 1


def test_a_tenant_far_below_its_share_gets_memory_for_a_second_request() -> None:
    """That one of its requests runs is no reason to have the next one wait for a flood."""
    world = CoreWorld(FairShare(), num_blocks=64, max_rows=32, max_step_tokens=256)
    for _ in range(40):
        world.submit(A, num_prompt=16, num_output=200)
    world.step(12)
    first = world.submit(B, num_prompt=16, num_output=100)
    world.step(3)
    second = world.submit(B, num_prompt=16, num_output=100)
    world.step(3)
    assert {first, second} <= world.admitted.keys()
    assert set(world.num_preemptions) <= {each for each, of in world.terms.items() if of == A}


def test_requests_that_come_close_together_are_not_put_behind_a_flood() -> None:
    """What a tenant's rows hold is its credit: it is charged for them, and still got less."""
    world = CoreWorld(FairShare(), num_blocks=800, max_rows=16, max_step_tokens=256)
    for _ in range(60):
        world.submit(A, num_prompt=16, num_output=200)
    world.step(12)
    world.submit(B, num_prompt=64, num_output=100)
    world.step(20)
    burst = []
    for _ in range(2):
        burst.append(world.submit(B, num_prompt=64, num_output=30))
        world.step()
    assert set(burst) <= world.admitted.keys()


def test_credit_ends_with_the_rows() -> None:
    """Whoever was served and is idle comes back with the counter of those who wait."""
    policy = FairShare()
    world = CoreWorld(policy, num_blocks=200, max_rows=8)
    world.submit(B, num_output=4)
    world.run_until_idle()
    for _ in range(40):
        world.submit(A, num_output=30)
    world.step(40)
    world.submit(B, num_prompt=4)
    assert policy.service("bee") == policy.service("ant")


def test_what_is_kept_for_growth_is_open_to_a_tenant_that_holds_little() -> None:
    """It enters without anybody's giving way, where others wait for what is kept."""
    world = CoreWorld(FairShare(), num_blocks=28, max_rows=8, max_step_tokens=256)
    for _ in range(4):
        world.submit(A, num_prompt=20, num_output=30)
    world.step(1)
    only = world.submit(B, num_prompt=8)
    later = world.submit(A, num_prompt=8)
    world.step(1)
    assert only in world.admitted
    assert later not in world.admitted
    assert world.scheduler.stats().num_preemptions == 0


def test_whoever_holds_most_gives_way_where_memory_is_short() -> None:
    """Not the latest request: that is the one of whoever came into the flood."""
    world = CoreWorld(FairShare(), num_blocks=40, max_rows=8, max_step_tokens=256)
    for _ in range(5):
        world.submit(A, num_prompt=12, num_output=60)
    world.step(4)
    world.submit(B, num_prompt=12, num_output=60)
    world.run_until_idle()
    assert world.num_preemptions
    assert {world.terms[each] for each in world.num_preemptions} == {A}
