"""Large jobs pause while others want their processor, and only then."""

from __future__ import annotations

import threading

import pytest

from lorax_shard import giving_way
from lorax_shard.giving_way import SlicedJob, in_slices, rest, seconds_waited

MB = 1 << 20
SLICE_S = 0.002


class Processor:
    """A made-up one: what is computed takes time, and while others want it each slice waits too."""

    def __init__(self, waits_s: float) -> None:
        self.waits_s = waits_s
        self.now = self.computed = self.waited = 0.0
        self.pauses: list[float] = []

    def job(self, patience_s: float) -> SlicedJob:
        return SlicedJob(
            patience_s,
            clock=lambda: self.now,
            computed=lambda: self.computed,
            waited=lambda: self.waited,
            pause=self.pause,
        )

    def pause(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds

    def work(self, job: SlicedJob, slices: int) -> float:
        """Return which part of the time it computed."""
        began, used = self.now, self.computed
        for _ in range(slices):
            self.computed += SLICE_S
            self.waited += self.waits_s
            self.now += SLICE_S + self.waits_s
            job.rest()
        return (self.computed - used) / (self.now - began)


def test_where_a_processor_is_to_spare_nothing_pauses() -> None:
    processor = Processor(waits_s=0.0)
    assert processor.work(processor.job(60.0), 1000) == pytest.approx(1.0)
    assert processor.pauses == []


def test_where_others_want_it_a_seventeenth_is_left() -> None:
    processor = Processor(waits_s=0.001)
    job = processor.job(600.0)
    processor.work(job, 100)
    assert 0.04 < processor.work(job, 100) < 0.08
    # And all of it, soon after they are gone.
    processor.waits_s = 0.0
    processor.work(job, 100)
    assert processor.work(job, 100) > 0.95


def test_a_moment_of_others_costs_little() -> None:
    processor = Processor(waits_s=0.001)
    job = processor.job(600.0)
    processor.work(job, 1)
    processor.waits_s = 0.0
    processor.work(job, 1000)
    # As one pause at its full length, all together.
    assert sum(processor.pauses) < 17 * SLICE_S


def test_well_before_its_time_is_over_it_pauses_no_more() -> None:
    processor = Processor(waits_s=0.001)
    job = processor.job(12.0)
    assert processor.work(job, 100) < 0.2
    processor.work(job, 100)
    assert 3.0 < processor.now < 8.0
    processor.work(job, 1000)
    assert processor.now < 12.0
    late = len(processor.pauses)
    processor.work(job, 50)
    assert len(processor.pauses) == late


def test_only_what_is_large_has_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    rests: list[int] = []
    monkeypatch.setattr(SlicedJob, "rest", lambda _self: rests.append(threading.get_ident()))
    rest()
    with in_slices(63 * MB, 60.0):
        rest()
    assert rests == []
    with in_slices(64 * MB, 60.0):
        rest()
        # Other threads have jobs of their own.
        other = threading.Thread(target=rest)
        other.start()
        other.join()
        with in_slices(1, 60.0):
            rest()
        rest()
    rest()
    assert rests == [threading.get_ident()] * 3


def test_the_system_says_for_how_long_a_thread_waited(monkeypatch: pytest.MonkeyPatch) -> None:
    before = seconds_waited()
    assert 0.0 <= before <= seconds_waited()

    def none(*_: object) -> int:
        raise FileNotFoundError

    monkeypatch.setattr(giving_way.os, "open", none)
    assert 0.0 <= seconds_waited() <= seconds_waited()
