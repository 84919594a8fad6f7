"""What replicas tell each other of the service of tenants."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorax_ingress.routing.shares import ServiceExchange
from lorax_router.fronts.elsewhere import ServiceElsewhere


def exchange_of(names: str) -> ServiceExchange:
    exchange = ServiceExchange()
    for name in names:
        exchange.join(name)
        exchange.report(name, {})
    return exchange


def test_each_is_told_what_the_others_gave_as_far_as_it_grew() -> None:
    exchange = exchange_of("abc")
    exchange.report("a", {"t": 10.0})
    exchange.report("b", {"t": 5.0, "u": 1.0})
    assert exchange.elsewhere("a") == {"t": 5.0, "u": 1.0}
    assert exchange.elsewhere("b") == {"t": 10.0}
    assert exchange.elsewhere("c") == {"t": 15.0, "u": 1.0}
    assert exchange.elsewhere("c") == exchange.elsewhere("nobody") == {}
    exchange.report("a", {"t": 11.0})
    assert exchange.elsewhere("c") == {"t": 16.0}
    assert exchange.elsewhere("a") == {}


def test_what_was_given_before_a_replica_joined_is_no_news() -> None:
    """As where the ingress is started anew: it knows nothing, and must not tell it all again."""
    exchange = exchange_of("b")
    exchange.join("a")
    exchange.report("a", {"t": 1000.0})
    assert exchange.elsewhere("b") == {}
    exchange.report("a", {"t": 1003.0})
    assert exchange.elsewhere("b") == {"t": 3.0}


def test_one_that_is_attached_again_is_not_counted_twice() -> None:
    exchange = exchange_of("ab")
    exchange.report("a", {"t": 10.0})
    assert exchange.elsewhere("b") == {"t": 10.0}
    exchange.leave("a")
    exchange.join("a")
    exchange.report("a", {"t": 12.0})
    exchange.report("a", {"t": 15.0})
    assert exchange.elsewhere("b") == {"t": 13.0}


def test_what_is_paid_back_is_not_given_twice() -> None:
    exchange = exchange_of("ab")
    for amount in (100.0, 80.0, 110.0):
        exchange.report("a", {"t": amount})
    assert exchange.elsewhere("b") == {"t": 110.0}


def test_a_tenant_that_was_forgotten_begins_anew() -> None:
    exchange = exchange_of("ab")
    exchange.report("a", {"t": 100.0})
    exchange.report("a", {})
    exchange.report("a", {"t": 7.0})
    assert exchange.elsewhere("b") == {"t": 107.0}


class Core:
    """What a replica was charged."""

    def __init__(self) -> None:
        self.charged: dict[str, float] = {}
        self.elsewhere = ServiceElsewhere(self._charge)

    def _charge(self, amounts: object) -> None:
        assert isinstance(amounts, dict) and min(amounts.values()) > 0
        for tenant, amount in amounts.items():
            self.charged[tenant] = self.charged.get(tenant, 0.0) + amount


def test_what_two_ingresses_say_of_one_thing_is_charged_once() -> None:
    core = Core()
    one, other = core.elsewhere.teller(), core.elsewhere.teller()
    one.tell({})
    one.tell({"t": 10.0})
    other.tell({})
    for sums in ({"t": 10.0}, {"t": 12.0}):
        one.tell({"t": 10.0 + sums["t"]})
        other.tell(sums)
    assert core.charged == {"t": 22.0}
    other.tell({"t": 15.0})
    assert core.charged == {"t": 25.0}


def test_an_ingress_that_is_started_anew_begins_where_the_former_was() -> None:
    core = Core()
    one = core.elsewhere.teller()
    one.tell({"t": 500.0})
    assert core.charged == {}
    one.tell({"t": 530.0})
    other = core.elsewhere.teller()
    other.tell({"t": 1.0})
    other.tell({"t": 2.0, "u": 3.0})
    assert core.charged == {"t": 31.0, "u": 3.0}


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 50), st.integers(0, 3)))
)
def test_sums_agree_whatever_the_order(steps: list[tuple[int, int, int, int]]) -> None:
    """In the end each was charged exactly what the others gave, by one ingress or by two."""
    exchanges = [exchange_of("012") for _ in range(2)]
    cores = [Core() for _ in range(3)]
    tellers = [[core.elsewhere.teller() for core in cores] for _ in exchanges]
    given_by = [dict.fromkeys("tuv", 0.0) for _ in range(3)]

    def tell(place: int, which: int) -> None:
        exchanges[which].report(str(place), given_by[place])
        tellers[which][place].tell(exchanges[which].elsewhere(str(place)))

    for _ in range(2):
        for place in range(3):
            for which in range(2):
                tell(place, which)
    for place, tenant, amount, asks in steps:
        given_by[place]["tuv"[tenant]] += amount
        if asks < 2:
            tell(place, asks)
    for _ in range(2):
        for place in range(3):
            for which in range(2):
                tell(place, which)
    for place in range(3):
        for tenant in "tuv":
            others = sum(given_by[each][tenant] for each in range(3) if each != place)
            assert cores[place].charged.get(tenant, 0.0) == pytest.approx(others)
