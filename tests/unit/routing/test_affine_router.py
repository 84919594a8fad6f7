"""Where requests go: by what replicas said, and by what was sent since."""

from __future__ import annotations

from collections import Counter
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
    for key in ("resident", "hosted"):
        values[key] = frozenset(values.get(key, ()))
    return ReplicaView(name=name, taken_at=at, **values)


def router(*views: ReplicaView, seed: int = 0, **constants: Any) -> AffineRouter:
    made = AffineRouter(Random(seed).randrange, RoutingSettings(**constants))
    for each in views:
        made.see(each)
    return made


class Traffic:
    """Sends requests, and knows what goes on."""

    def __init__(self, made: AffineRouter) -> None:
        self.router = made
        self.num = 0

    def send(self, adapter: str | None, now: float = 0.0, **facts: Any) -> RouteDecision:
        request = RouteRequest(adapter=adapter, **facts)
        decision = self.router.route(request, now)
        assert decision is not None
        self.router.sent(str(self.num), request, decision.replica, now)
        self.router.fleet.check()
        self.num += 1
        return decision


# --- by rule ----------------------------------------------------------------------------


def test_a_request_goes_where_its_adapter_is() -> None:
    made = router(view("a"), view("b", resident=["x"]), view("c"))
    assert made.route(RouteRequest("x"), 0.0) == RouteDecision("b", RouteReason.RESIDENT)


def test_what_was_just_sent_counts_although_no_view_knows_it() -> None:
    traffic = Traffic(router(view("a"), view("b"), view("c")))
    first = traffic.send("x")
    assert first.reason is RouteReason.HOME
    assert traffic.send("x") == RouteDecision(first.replica, RouteReason.RESIDENT)
    # A view from before it was sent changes nothing.
    traffic.router.see(view(first.replica, at=0.0))
    assert traffic.send("x", 0.1).replica == first.replica


def test_an_adapter_in_host_memory_comes_before_one_in_the_store() -> None:
    made = router(view("a"), view("b"), view("c", hosted=["x"]))
    assert made.route(RouteRequest("x"), 0.0) == RouteDecision("c", RouteReason.HOST)


def test_the_base_model_goes_by_load() -> None:
    made = router(view("a", num_running=50), view("b"))
    assert made.route(RouteRequest(), 0.0) == RouteDecision("b", RouteReason.LOAD)


def test_a_prefix_goes_where_it_is_cached() -> None:
    traffic = Traffic(router(*[view(name) for name in "abcdef"], slack=10.0))
    blocks = tuple(bytes([number]) for number in range(8))
    first = traffic.send(None, prefix=blocks)
    longer = (*blocks, b"more")
    assert all(
        traffic.send(None, prefix=longer[: 8 + i % 2]).replica == first.replica for i in range(2)
    )
    assert traffic.send(None, prefix=longer).reason is RouteReason.PREFIX
    # Too short to count; another tenant's.
    assert traffic.send(None, prefix=blocks[:3]).reason is RouteReason.LOAD
    assert traffic.send(None, prefix=blocks, tenant="other").reason is RouteReason.LOAD


def test_a_prefix_does_not_outweigh_the_bound() -> None:
    traffic = Traffic(router(view("a"), view("b")))
    blocks = tuple(bytes([number]) for number in range(8))
    places = Counter(traffic.send(None, prefix=blocks).replica for _ in range(60))
    assert min(places["a"], places["b"]) >= 15


def test_cold_adapters_fill_free_slots_before_any_is_taken() -> None:
    traffic = Traffic(router(*[view(name) for name in "abc"]))
    places = Counter()
    for number in range(24):
        places[traffic.send(f"adapter-{number}", number * 0.01).replica] += 1
        traffic.router.ended(str(number), number * 0.01)
    assert places == {"a": 8, "b": 8, "c": 8}


def test_a_full_replica_gives_up_what_nobody_asks_for() -> None:
    made = router()
    used = [f"used-{number}" for number in range(8)]
    made.see(view("a", resident=used))
    made.see(view("b", resident=[f"unused-{number}" for number in range(8)]))
    for number, key in enumerate(used * 5):
        made.sent(str(number), RouteRequest(key), "a", 1.0)
        made.ended(str(number), 1.0)
    made.see(view("a", at=2.0, resident=used))
    places = {made.route(RouteRequest(f"new-{i}"), 2.0).replica for i in range(20)}  # type: ignore[union-attr]
    assert places == {"b"}


def test_a_home_with_far_more_work_is_passed_over() -> None:
    made = router(view("a", resident=["x"], num_running=100), view("b"), view("c"))
    for number in range(300):
        made.sent(f"old-{number}", RouteRequest("x"), "a", 0.0)
    decision = made.route(RouteRequest("x"), 0.0)
    assert decision is not None and decision.replica != "a"
    assert decision.reason in (RouteReason.SPREAD, RouteReason.OVERFLOW)


def test_a_replica_whose_memory_is_full_is_passed_over() -> None:
    made = router(view("a", kv_in_use=0.99), view("b"))
    assert made.route(RouteRequest("new"), 0.0).replica == "b"  # type: ignore[union-attr]


# --- hot ones ---------------------------------------------------------------------------


def test_a_hot_adapter_spreads_and_comes_back() -> None:
    made = router(*[view(f"r{number}", num_slots=32) for number in range(10)])
    traffic = Traffic(made)
    random = Random(1)
    now = 0.0

    def run(seconds: int, hot: float) -> Counter[str]:
        nonlocal now
        places: Counter[str] = Counter()
        for _ in range(seconds * 40):
            now += 1 / 40
            is_hot = random.random() < hot
            key = "hot" if is_hot else f"adapter-{random.randrange(40)}"
            number = traffic.num
            place = traffic.send(key, now).replica
            if is_hot:
                places[place] += 1
            if number >= 60:
                made.ended(str(number - 60), now)
        return places

    run(60, hot=0.5)
    assert len(made.homes("hot", now)) >= 8
    spread = run(20, hot=0.5)
    assert len(spread) >= 5 and max(spread.values()) < 0.4 * spread.total()
    run(240, hot=0.01)
    assert len(made.homes("hot", now)) == 1
    # All homes that it had still have it: only one of them is asked.
    assert len(run(60, hot=0.01)) <= 2


# --- who gets nothing -------------------------------------------------------------------


def test_nobody_takes_requests() -> None:
    made = router(view("a", is_accepting=False))
    assert made.route(RouteRequest("x"), 0.0) is None
    assert router().route(RouteRequest(), 0.0) is None


def test_a_dead_replica_is_forgotten_with_all_that_was_on_it() -> None:
    traffic = Traffic(router(view("a", resident=["x"]), view("b")))
    assert traffic.send("x").replica == "a"
    assert traffic.router.forget("a") == ["0"]
    assert traffic.router.forget("a") == []
    traffic.router.ended("0", 1.0)
    again = traffic.send("x", 1.0)
    assert again == RouteDecision("b", RouteReason.HOME)
    # It comes back with nothing.
    traffic.router.see(view("a", at=2.0))
    assert traffic.send("x", 2.0).replica == "b"


def test_a_request_is_sent_once_at_a_time() -> None:
    made = router(view("a"))
    made.sent("one", RouteRequest(), "a", 0.0)
    with pytest.raises(ValueError, match="end it first"):
        made.sent("one", RouteRequest(), "a", 0.0)


# --- what views leave out ---------------------------------------------------------------


def test_views_count_what_was_sent_and_ended_since_they_were_taken() -> None:
    made = router(view("a"))
    for number in range(6):
        made.sent(str(number), RouteRequest(), "a", float(number))
    assert made.fleet.load("a") == 6.0
    made.ended("0", 5.5)
    # Taken at 3.5, when 0 to 3 were there; 4 and 5 came later, 0 went later.
    made.see(view("a", at=3.5, num_running=4))
    assert made.fleet.load("a") == 5.0
    # An older view is passed over; a younger one knows of all.
    made.see(view("a", at=2.0, num_running=99))
    assert made.fleet.load("a") == 5.0
    made.see(view("a", at=6.0, num_running=5))
    assert made.fleet.load("a") == 5.0


def test_a_prompt_is_work_until_its_first_token() -> None:
    made = router(view("a"), prompt_unit=100)
    made.sent("one", RouteRequest(num_prompt_tokens=300), "a", 0.0)
    assert made.fleet.load("a") == 4.0
    made.begins("one")
    assert made.fleet.load("a") == 1.0
    made.begins("unknown")
    made.ended("one", 1.0)
    assert made.fleet.load("a") == 0.0


# --- always -----------------------------------------------------------------------------

ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["send", "send", "send", "end", "see", "drain", "die", "begin"]),
        st.integers(0, 7),
        st.integers(0, 15),
    ),
    max_size=120,
)


def play(actions: list[tuple[str, int, int]], seed: int) -> list[RouteDecision | None]:
    """Do as told; return what was decided. Checks what must hold after each action."""
    made = router(seed=seed)
    open_names: set[str] = set()
    running: list[str] = []
    decisions: list[RouteDecision | None] = []
    for number, (action, one, other) in enumerate(actions):
        name, now = f"r{one}", number * 0.25
        if action in ("see", "drain"):
            held = [f"a{each}" for each in range(other)]
            made.see(
                view(name, now, is_accepting=action == "see", resident=held[:8], num_running=one)
            )
            open_names = open_names | {name} if action == "see" else open_names - {name}
        elif action == "die":
            open_names -= {name}
            lost = made.forget(name)
            running = [each for each in running if each not in lost]
        elif action == "send":
            request = RouteRequest(f"a{other}" if other else None, num_prompt_tokens=10 * one)
            decision = made.route(request, now)
            decisions.append(decision)
            # Neither draining nor dead ones get anything.
            assert (decision is None) == (not open_names)
            if decision is not None:
                assert decision.replica in open_names
                made.sent(str(number), request, decision.replica, now)
                running.append(str(number))
        elif running and action == "begin":
            made.begins(running[other % len(running)])
        elif running:
            made.ended(running.pop(other % len(running)), now)
        made.fleet.check()
    return decisions


@settings(max_examples=150, deadline=None)
@given(ACTIONS, st.integers(0, 3))
def test_books_are_right_and_answers_the_same_whatever_happens(
    actions: list[tuple[str, int, int]], seed: int
) -> None:
    assert play(actions, seed) == play(actions, seed)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 60), min_size=2, max_size=12), st.integers(0, 5))
def test_a_home_beyond_the_bound_gets_nothing_that_another_home_takes(
    loads: list[int], seed: int
) -> None:
    """All are homes of it and have it: nobody above the bound is chosen."""
    views = [
        view(f"r{i}", resident=["hot"], num_running=load, num_slots=4)
        for i, load in enumerate(loads)
    ]
    made = router(*views, seed=seed, slack=0.0)
    for number in range(400):
        made._rates.note("hot", 1.0, number * 0.01)
    assert made._rates.num_homes("hot", len(loads), 4.0) == len(loads)
    decision = made.route(RouteRequest("hot"), 4.0)
    assert decision is not None
    bound = (1 + made.settings.tolerance) * (sum(loads) + 1) / len(loads)
    assert made.fleet.load(decision.replica) <= bound
