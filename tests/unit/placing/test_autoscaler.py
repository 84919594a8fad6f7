"""How many replicas are wanted, by what they have to do."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from lorax_launcher.placing.autoscaler import Autoscaler
from lorax_launcher.placing.values import GroupLoad

BOUNDS = (1, 6)


def driven(
    load_at: Callable[[float, int], list[GroupLoad]], seconds: int, start: int = 1
) -> list[int]:
    """The number of replicas at each second; new ones serve at once."""
    scaler, wanted, found = Autoscaler(), start, []
    for now in range(seconds):
        wanted = scaler.wanted(load_at(now, wanted), wanted, BOUNDS, float(now))
        found.append(wanted)
    return found


def queued(total: int) -> Callable[[float, int], list[GroupLoad]]:
    return lambda _now, num: [GroupLoad(num_queued=total), *[GroupLoad()] * (num - 1)]


def test_a_queue_that_stays_brings_replicas() -> None:
    found = driven(queued(18), 300)
    # No sooner than after half a minute, two at most in a minute, as many as the queue needs.
    assert found[29] == 1
    assert found[30] == 3
    assert max(later - earlier for earlier, later in pairwise(found)) == 2
    assert found[-1] == 5


def test_a_moment_of_many_brings_none() -> None:
    def load(now: float, num: int) -> list[GroupLoad]:
        return [GroupLoad(num_queued=100 if now % 30 < 20 else 0)] * num

    assert set(driven(load, 400)) == {1}


def test_a_full_cache_brings_replicas_and_the_border_makes_none_come_and_go() -> None:
    """All replicas together hold 1.7 caches: three have 57 % each, two would have 85 %."""
    found = driven(lambda _now, num: [GroupLoad(kv_in_use=1.7 / num)] * num, 3000)
    assert found[-1] == 3
    assert sorted(found) == found


def test_quiet_ends_them_one_by_one() -> None:
    found = driven(lambda _now, num: [GroupLoad()] * num, 2000, start=4)
    assert found[599] == 4
    changes = [now for now in range(1, 2000) if found[now] != found[now - 1]]
    assert [found[now] for now in changes] == [3, 2, 1]
    assert min(later - earlier for earlier, later in pairwise(changes)) >= 180


def test_the_bounds_hold_at_once() -> None:
    scaler = Autoscaler()
    assert scaler.wanted([], 1, (3, 3), 0.0) == 3
    assert scaler.wanted([], 3, (0, 0), 1.0) == 0


@given(st.lists(st.tuples(st.integers(0, 50), st.floats(0, 1)), min_size=1, max_size=200))
def test_it_never_leaves_the_bounds(loads: list[tuple[int, float]]) -> None:
    scaler, wanted = Autoscaler(), 2
    for step, (num_queued, kv) in enumerate(loads):
        load = GroupLoad(num_queued=num_queued, kv_in_use=kv)
        before = wanted
        wanted = scaler.wanted([load] * wanted, wanted, (2, 4), step * 20.0)
        assert 2 <= wanted <= 4
        assert before - 1 <= wanted <= before + 2
