"""A token bucket: a rate over time, debts, and other rates."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorax_router.service.keys.bucket import TokenBucket


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_what_a_minute_brings_can_be_taken_at_once_and_then_nothing() -> None:
    clock = Clock()
    bucket = TokenBucket(60, clock)
    for _ in range(60):
        assert bucket.wait_s() == 0
        bucket.take(1)
    assert bucket.wait_s() == pytest.approx(1.0)
    clock.now += 0.25
    assert bucket.wait_s() == pytest.approx(0.75)
    clock.now += 0.75
    assert bucket.wait_s() == 0


def test_idle_time_saves_up_no_more_than_a_minute() -> None:
    clock = Clock()
    bucket = TokenBucket(60, clock)
    clock.now += 3600
    bucket.take(60)
    assert bucket.wait_s() > 0


def test_what_is_taken_beyond_what_is_there_is_paid_first() -> None:
    clock = Clock()
    bucket = TokenBucket(60, clock)
    bucket.take(180)
    assert bucket.wait_s() == pytest.approx(121)


def test_another_rate_keeps_what_was_taken() -> None:
    clock = Clock()
    bucket = TokenBucket(60, clock)
    bucket.take(50)
    bucket.set_rate(120)
    assert bucket.wait_s() == 0
    bucket.take(70)
    assert bucket.wait_s() == pytest.approx(0.5)
    bucket.set_rate(10)
    assert bucket.wait_s() > 60


@given(
    per_minute=st.integers(1, 10_000),
    steps=st.lists(st.tuples(st.floats(0, 30), st.integers(1, 500)), max_size=60),
)
def test_over_time_nobody_takes_more_than_the_rate_and_what_is_owed(
    per_minute: int, steps: list[tuple[float, int]]
) -> None:
    clock = Clock()
    bucket = TokenBucket(per_minute, clock)
    taken, largest = 0, 0
    for pause, size in steps:
        clock.now += pause
        if bucket.wait_s() == 0:
            bucket.take(size)
            taken, largest = taken + size, max(largest, size)
    came = per_minute * (1 + (clock.now - 100.0) / 60)
    assert taken <= came + largest
