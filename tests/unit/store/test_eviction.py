"""Which entry gives way first."""

from __future__ import annotations

import pytest

from lorax_shard.store.eviction import HALF_LIFE_S, Candidate, decayed, order

USUAL = {"size": 100, "cost_s": 1.0, "idle_s": 100.0, "uses": 1.0}


@pytest.mark.parametrize(
    "less_wanted",
    [{"idle_s": 300.0}, {"size": 300}, {"cost_s": 0.3}, {"uses": 0.0}, {"cost_s": 0.0}],
)
def test_idle_large_cheap_and_rarely_used_go_first(less_wanted: dict[str, float]) -> None:
    usual = Candidate(digest="usual", **USUAL)  # type: ignore[arg-type]
    other = Candidate(digest="other", **{**USUAL, **less_wanted})  # type: ignore[arg-type]
    assert order([usual, other]) == order([other, usual]) == ["other", "usual"]


def test_a_clock_that_went_back_does_no_harm() -> None:
    future = Candidate(digest="future", **{**USUAL, "idle_s": -50.0})  # type: ignore[arg-type]
    usual = Candidate(digest="usual", **USUAL)  # type: ignore[arg-type]
    assert order([future, usual]) == ["usual", "future"]
    assert decayed(4.0, -1.0) == 4.0


def test_old_uses_count_less() -> None:
    assert decayed(4.0, HALF_LIFE_S) == pytest.approx(2.0)
    assert decayed(4.0, 0.0) == 4.0
