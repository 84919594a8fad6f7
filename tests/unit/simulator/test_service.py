"""Service and the gap between those who wait, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from lorax_router.simulator.service import MAX_WINDOWS, ServiceMeter, most_asking, vtc_bound


def meter(*weights: float) -> ServiceMeter:
    return ServiceMeter(weights, range(len(weights)), window_s=1.0)


def test_the_gap_counts_only_while_both_wait() -> None:
    m = meter(1.0, 1.0)
    m.waits(0)
    m.serve({0: 100.0}, 0.1)  # the other does not wait
    m.waits(1)
    m.serve({0: 10.0}, 0.2)
    m.serve({1: 4.0}, 0.3)
    assert m.gap == 10.0
    m.leaves(1)
    m.serve({0: 500.0}, 0.4)
    assert m.gap == 10.0
    assert m.service == [610.0, 4.0]


def test_the_gap_is_of_any_interval_not_only_from_the_start() -> None:
    m = meter(1.0, 1.0)
    m.waits(0)
    m.waits(1)
    m.serve({0: 30.0}, 0.1)
    m.serve({1: 50.0}, 0.2)
    # +30 after the first, -20 after the second: 50 between.
    assert m.gap == 50.0
    assert m.gap_pair in {(0, 1), (1, 0)}


def test_a_client_that_comes_back_begins_anew() -> None:
    m = meter(1.0, 1.0)
    m.waits(0)
    m.waits(1)
    m.serve({0: 8.0}, 0.1)
    m.leaves(1)
    m.waits(1)
    m.serve({0: 7.0}, 0.2)
    assert m.gap == 8.0


def test_shares_count() -> None:
    m = meter(1.0, 4.0)
    m.waits(0)
    m.waits(1)
    m.serve({0: 10.0, 1: 40.0}, 0.1)
    assert m.gap == 0.0
    m.serve({1: 40.0}, 0.2)
    assert m.gap == 10.0


def test_two_requests_of_a_client_are_one_backlog() -> None:
    m = meter(1.0, 1.0)
    m.waits(0)
    m.waits(1)
    m.waits(1)
    m.leaves(1)
    m.serve({0: 5.0}, 0.1)
    assert m.gap == 5.0


def test_service_over_time_is_kept_by_windows() -> None:
    m = meter(1.0)
    m.serve({0: 1.0}, 0.5)
    m.serve({0: 2.0}, 2.5)
    m.finish()
    assert m.series == [[1.0], [1.0], [3.0]]


def test_a_long_run_keeps_fewer_windows() -> None:
    m = meter(1.0)
    for second in range(1, 1000):
        m.serve({0: 1.0}, second + 0.5)
    assert len(m.series) < MAX_WINDOWS
    assert m.window_s == 4.0
    # Window i ends at 4 (i + 1).
    assert [row[0] for row in m.series[:3]] == [3.0, 7.0, 11.0]


def test_those_who_ask_for_most_are_compared() -> None:
    clients = np.arange(200) % 100
    work = np.where(clients < 36, 1.0, 2.0)
    assert most_asking(clients, work, 120) == list(range(36, 100))


def test_bound_of_vtc() -> None:
    assert vtc_bound(256, 10_000) == 40_000
    assert vtc_bound(50_000, 10_000) == pytest.approx(100_000)
