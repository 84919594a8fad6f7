"""Homes have adapters loaded before requests come there."""

from __future__ import annotations

from random import Random
from typing import Any

from lorax_ingress.routing.router import AffineRouter
from lorax_ingress.routing.values import (
    ReplicaView,
    RouteDecision,
    RouteReason,
    RouteRequest,
    RoutingSettings,
)


def view(name: str, at: float = 0.0, **facts: Any) -> ReplicaView:
    values: dict[str, Any] = {"num_slots": 8, **facts}
    values["resident"] = frozenset(values.get("resident", ()))
    return ReplicaView(name=name, taken_at=at, **values)


def router(*names: str, **constants: Any) -> AffineRouter:
    made = AffineRouter(Random(0).randrange, RoutingSettings(**constants))
    for each in names:
        made.see(view(each, num_slots=100))
    return made


def serve(made: AffineRouter, adapter: str, at: float, *, by: str = "", may: bool = True) -> str:
    """Have a request answered; returns where."""
    request = RouteRequest(adapter, can_preload=may)
    decision = made.route(request, at)
    assert decision is not None
    name, number = by or decision.replica, f"{adapter} {at} {by}"
    made.sent(number, request, name, at)
    made.begins(number)
    made.ended(number, at)
    return name


KEYS = [f"adapter-{number}" for number in range(40)]


def test_a_replica_that_joins_loads_what_it_is_home_of_the_hottest_first() -> None:
    made = router("a", "b")
    for number, key in enumerate(KEYS):
        for turn in range(2 + number % 5):
            serve(made, key, 1.0 + turn / 10)
    assert made.take_preloads() == []
    made.see(view("c", 2.0))
    preloads = made.take_preloads()
    told = [adapter for name, adapter in preloads if name == "c"]
    # As many as it has slots, of those whose home it is now.
    assert len(told) == len(preloads) == 8
    assert all("c" in made.homes(key, 2.0) for key in told)
    asked = [2 + KEYS.index(key) % 5 for key in told]
    assert asked == sorted(asked, reverse=True)
    others = [key for key in KEYS if key not in told and "c" in made.homes(key, 2.0)]
    assert all(2 + KEYS.index(key) % 5 <= min(asked) for key in others)
    # Once is enough.
    made.see(view("c", 3.0))
    assert made.take_preloads() == []


def test_requests_go_there_once_it_says_that_it_has_it() -> None:
    made = router("a")
    for turn in range(4):
        serve(made, "y", 1.0 + turn / 10)
    made.see(view("a", 2.0, resident=["y"]))
    joining = next(
        name for name in (f"new-{n}" for n in range(20))
        if _is_home(made, name, "y")
    )  # fmt: skip
    made.see(view(joining, 2.0))
    assert made.take_preloads() == [(joining, "y")]
    assert serve(made, "y", 2.1) == "a"
    made.see(view(joining, 3.0, resident=["y"]))
    assert serve(made, "y", 3.1) == joining


def _is_home(made: AffineRouter, name: str, adapter: str) -> bool:
    """Whether a replica would be the first home beside those that there are."""
    other = router(*made.fleet.books, name)
    return other.homes(adapter, 0.0)[0] == name


def test_nothing_is_told_of_what_needs_a_token_or_had_no_answer() -> None:
    made = router("a", "b")
    for key in KEYS:
        for turn in range(3):
            serve(made, key, 1.0 + turn / 10, may=False)
    failing = RouteRequest("failing", can_preload=True)
    for turn in range(40):
        made.sent(f"failing {turn}", failing, "a", 1.0)
        made.ended(f"failing {turn}", 1.0)
    made.see(view("c", 2.0))
    assert made.take_preloads() == []


def test_what_hardly_anyone_asks_for_is_left() -> None:
    made = router("a", "b")
    for key in KEYS:
        serve(made, key, 1.0)
    made.see(view("c", 61.0))
    assert made.take_preloads() == []


def test_a_replica_that_comes_back_loads_what_it_has_not() -> None:
    made = router("a", "b")
    for key in KEYS:
        for turn in range(3):
            serve(made, key, 1.0 + turn / 10)
    homes = {key: made.homes(key, 2.0) for key in KEYS}
    at_b = [key for key in KEYS if homes[key] == ["b"]]
    made.see(view("b", 2.0, num_slots=100, is_accepting=False))
    made.see(view("b", 3.0, num_slots=100, resident=at_b[:3]))
    told = [adapter for _, adapter in made.take_preloads()]
    assert sorted(told) == sorted(at_b[3:])


def test_what_a_lost_replica_alone_had_is_loaded_at_its_next_home() -> None:
    made = router("a", "b")
    for key in KEYS:
        for turn in range(3):
            serve(made, key, 1.0 + turn / 10)
    at_a = [key for key in KEYS if "a" in made.fleet.holders(key)]
    for name in "ab":
        held = [key for key in KEYS if name in made.fleet.holders(key)]
        made.see(view(name, 2.0, num_slots=100, resident=held))
    made.forget("a")
    assert sorted(made.take_preloads()) == sorted(("b", key) for key in at_a)


def spreading(**constants: Any) -> tuple[AffineRouter, RouteRequest]:
    """An adapter with all traffic, on one of three replicas."""
    made = router("a", "b", "c", **constants)
    serve(made, "hot", -100.0, by="a")
    request = RouteRequest("hot", can_preload=True)
    made.see(view("a", num_slots=100, resident=["hot"]))
    for number in range(3):
        made.sent(str(number), request, "a", 0.1)
    return made, request


def test_a_hot_adapter_is_loaded_at_its_next_home_while_requests_go_where_it_is() -> None:
    made, request = spreading()
    decision = made.route(request, 0.2)
    assert decision is not None and decision.reason is RouteReason.RESIDENT
    new = decision.preload_at
    assert decision.replica == "a" and new in ("b", "c")
    assert new is not None
    made.preloads_at("hot", new, 0.2)
    made.preloads_at("hot", new, 0.3)
    assert made.take_preloads() == [(new, "hot")]
    made.see(view(new, 1.0, resident=["hot"]))
    assert made.route(request, 1.1) == RouteDecision(new, RouteReason.RESIDENT)


def test_it_goes_there_in_any_case_once_that_takes_too_long() -> None:
    made, request = spreading(patience_s=2.0)
    new = made.route(request, 0.2).preload_at  # type: ignore[union-attr]
    assert new is not None
    made.preloads_at("hot", new, 0.2)
    for at, expected in ((2.1, "a"), (2.3, new)):
        made.see(view(new, at))
        decision = made.route(request, at)
        assert decision is not None and decision.replica == expected
    assert decision.reason is RouteReason.SPREAD


def test_it_goes_there_at_once_where_there_is_no_free_slot_or_it_may_not_be_preloaded() -> None:
    made, request = spreading(preloads=False)
    decision = made.route(request, 0.2)
    assert decision is not None and decision.reason is RouteReason.SPREAD
    assert decision.preload_at is None
