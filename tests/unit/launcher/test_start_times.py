"""How long a start took, by process and part."""

from __future__ import annotations

import itertools

import pytest

from lorax_launcher.start_times import StartTimes, start_table


def ticking(step: float = 1.0):
    """Return a clock that goes on by ``step`` whenever it is looked at."""
    return (step * each for each in itertools.count()).__next__


def test_what_a_process_does_not_count_came_before_it_counted() -> None:
    times = StartTimes(ticking())
    times.began("shard-0")  # at 1
    times.reported("shard-0", {"imports": 0.25})  # at 2
    assert times.report() == {
        "total_s": 3.0,
        "processes": [
            {
                "process": "shard-0", "from_s": 1.0, "until_s": 2.0,
                "parts": {"starting Python": 0.75, "imports": 0.25},
            }
        ],
    }  # fmt: skip


@pytest.mark.parametrize("parts", [None, [], {"imports": "long"}])
def test_a_process_that_tells_no_parts_has_its_times(parts: object) -> None:
    times = StartTimes(ticking())
    times.began("prepare")
    times.reported("prepare", parts)
    (process,) = times.report()["processes"]
    assert process == {"process": "prepare", "from_s": 1.0, "until_s": 2.0, "parts": {}}


def test_short_parts_are_left_out_of_the_table() -> None:
    times = StartTimes(ticking())
    times.began("router")
    times.reported("router", {"imports": 0.4, "listening": 0.001})
    _, line = start_table(times.report())
    assert line.split() == "router 1.00 2.00 starting Python 0.60, imports 0.40".split()


@pytest.mark.parametrize("value", [None, 3, {}, {"processes": 3}])
def test_what_is_no_report_gives_no_table(value: object) -> None:
    assert start_table(value) == []
