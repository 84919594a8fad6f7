"""Traffic by adapter, and the homes that it takes."""

from __future__ import annotations

import pytest

from lorax_ingress.routing.popularity import Popularity


def popularity(**changes: float) -> Popularity:
    values = {"half_life_s": 10.0, "home_share": 0.5, "shrink_at": 0.7, "max_keys": 1000}
    return Popularity(**{**values, **changes})  # type: ignore[arg-type]


def feed(rates: Popularity, shares: dict[str, int], start: float, seconds: int) -> float:
    """Book so many requests a second of each; return when that ends."""
    for second in range(seconds):
        for key, num in shares.items():
            for _ in range(num):
                rates.note(key, 1.0, start + second)
    return start + seconds - 1


def test_the_share_of_steady_traffic_is_its_share() -> None:
    rates = popularity()
    now = feed(rates, {"hot": 30, "warm": 10}, 0.0, 40)
    assert rates.share("hot", now) == pytest.approx(0.75)
    assert rates.share("unheard", now) == 0.0


def test_the_past_fades() -> None:
    rates = popularity()
    now = feed(rates, {"old": 10}, 0.0, 20)
    before = rates.recent("old", now)
    assert rates.recent("old", now + 10.0) == pytest.approx(before / 2)


def test_a_hot_adapter_gets_homes_by_its_share_and_gives_them_back() -> None:
    rates = popularity()
    now = feed(rates, {"hot": 40, "rest": 60}, 0.0, 60)
    # 40 % of ten replicas' work, half a replica each: eight homes.
    assert rates.num_homes("hot", 10, now) in (7, 8)
    now = feed(rates, {"hot": 1, "rest": 99}, now + 1.0, 120)
    assert rates.num_homes("hot", 10, now) == 1


def test_homes_do_not_go_to_and_fro() -> None:
    rates = popularity()
    now = feed(rates, {"hot": 40, "rest": 60}, 0.0, 60)
    held = rates.num_homes("hot", 10, now)
    # A little less is no reason to give one back.
    now = feed(rates, {"hot": 34, "rest": 66}, now + 1.0, 60)
    assert rates.num_homes("hot", 10, now) == held


def test_a_few_requests_by_chance_are_no_traffic() -> None:
    rates = popularity()
    rates.note("first", 1.0, 0.0)
    assert rates.num_homes("first", 10, 0.0) == 1
    assert rates.num_homes("unheard", 10, 0.0) == 1


def test_there_are_no_more_homes_than_replicas() -> None:
    rates = popularity()
    now = feed(rates, {"all": 50}, 0.0, 30)
    assert rates.num_homes("all", 3, now) == 3
    assert rates.num_homes("all", 2, now) == 2


def test_what_is_remembered_is_bounded_and_keeps_the_hot() -> None:
    rates = popularity(max_keys=50)
    for number in range(2000):
        rates.note("hot", 1.0, float(number) / 100)
        rates.note(f"cold-{number}", 1.0, float(number) / 100)
    assert len(rates._rates) <= 50
    assert rates.recent("hot", 20.0) > 500


def test_the_base_model_is_traffic_without_homes() -> None:
    rates = popularity()
    rates.note(None, 3.0, 0.0)
    rates.note("one", 1.0, 0.0)
    assert rates.share("one", 0.0) == pytest.approx(0.25)
