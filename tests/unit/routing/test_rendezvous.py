"""Homes: few move, capacity counts, every process finds the same."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorax_ingress.routing.rendezvous import Rendezvous, first_homes, moved

KEYS = [f"adapter-{number}" for number in range(4000)]


def names(num: int) -> dict[str, float]:
    return {f"replica-{number}": 1.0 for number in range(num)}


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40))
def test_a_replica_that_joins_moves_its_own_part_and_nothing_else(num: int) -> None:
    before, after = names(num), names(num + 1)
    changes = moved(before, after, KEYS)
    assert {new for _, new in changes.values()} <= {f"replica-{num}"}
    part = len(KEYS) / (num + 1)
    # Four standard deviations of a draw of that part.
    assert abs(len(changes) - part) <= 4 * part**0.5


def test_a_replica_that_leaves_moves_only_what_it_had() -> None:
    before = names(8)
    homes = first_homes(before, KEYS)
    after = {name: weight for name, weight in before.items() if name != "replica-3"}
    assert set(moved(before, after, KEYS)) == {k for k in KEYS if homes[k] == "replica-3"}


def test_capacity_is_the_part_of_homes() -> None:
    homes = list(first_homes({"small": 1.0, "large": 3.0}, KEYS).values())
    assert homes.count("large") / len(KEYS) == pytest.approx(0.75, abs=0.03)


def test_who_ranks_does_not_depend_on_the_order_of_names() -> None:
    one, other = Rendezvous(), Rendezvous()
    one.use(names(9))
    other.use(dict(reversed(names(9).items())))
    assert [one.ranked(key) for key in KEYS[:50]] == [other.ranked(key) for key in KEYS[:50]]
    # The same in every process and release: preloaded adapters lie where they are looked for.
    assert one.ranked("adapter-1")[:3] == ("replica-8", "replica-4", "replica-7")


def test_rankings_are_forgotten_and_made_again() -> None:
    few = Rendezvous(max_ranked=2)
    few.use(names(5))
    first = few.ranked("a")
    few.ranked("b")
    few.ranked("c")
    assert few.ranked("a") == first


def test_nothing_moves_without_replicas() -> None:
    assert first_homes({}, KEYS[:3]) == {}
    assert moved({}, {}, KEYS[:3]) == {}
    assert moved({}, {"a": 1.0}, ["k"]) == {"k": (None, "a")}
