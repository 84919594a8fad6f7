"""Counts by adapter: bounded, and never falling."""

from __future__ import annotations

import random

import pytest

from lorax_router.service.adapters.metrics import ADAPTER_REQUESTS, AdapterUsage


def counts(usage: AdapterUsage) -> dict[str, float]:
    """The requests of each series but the one of private adapters, which none of these are."""
    (family,) = [each for each in usage.collect() if each.name == ADAPTER_REQUESTS.name]
    found = {sample.labels["adapter"]: sample.value for sample in family.samples}
    assert found.pop("private") == 0
    return found


def use(usage: AdapterUsage, label: str, times: int = 1, *, was_found: bool = True) -> None:
    for _ in range(times):
        usage.ended(label, was_found=was_found, num_tokens=1, failed=not was_found)


def test_the_first_adapters_have_series_of_their_own_and_the_rest_is_other():
    usage = AdapterUsage(2)
    for label in ("a", "b", "c", "c"):
        use(usage, label)
    assert counts(usage)["a"] == counts(usage)["b"] == 1


def test_a_busier_adapter_gets_a_series_and_what_was_other_stays_there():
    usage = AdapterUsage(1)
    use(usage, "a", 3)
    use(usage, "b", 3)
    assert counts(usage) == {"a": 3, "other": 3}
    use(usage, "b", 2)
    assert counts(usage) == {"a": 3, "b": 2, "other": 3}


def test_the_least_used_is_left_out_when_there_are_twice_as_many():
    usage = AdapterUsage(1)
    use(usage, "a", 1)
    use(usage, "b", 3)
    assert set(counts(usage)) == {"a", "b", "other"}
    use(usage, "c", 5)
    assert set(counts(usage)) == {"b", "c", "other"}
    use(usage, "a")
    assert set(counts(usage)) == {"b", "c", "other"}


def test_one_that_comes_back_goes_on_where_it_was():
    usage = AdapterUsage(1)
    use(usage, "a", 4)
    use(usage, "b", 7)
    use(usage, "c", 12)
    assert "a" not in counts(usage)
    use(usage, "a", 20)
    assert counts(usage)["a"] >= 4


def test_names_that_were_never_found_have_no_series():
    usage = AdapterUsage(4)
    for number in range(100):
        use(usage, f"x{number}", was_found=False)
    assert counts(usage) == {"other": 100}
    use(usage, "a")
    use(usage, "a", was_found=False)
    assert counts(usage) == {"a": 2, "other": 100}


def test_an_adapter_called_other_is_no_second_series():
    usage = AdapterUsage(2)
    use(usage, "other", 5)
    use(usage, "a")
    assert counts(usage) == {"a": 1, "other": 5}


def test_old_fame_fades(monkeypatch):
    monkeypatch.setattr("lorax_router.service.adapters.metrics._HALF_LIFE", 50)
    usage = AdapterUsage(1)
    use(usage, "old", 1_000)
    use(usage, "new", 200)
    assert counts(usage)["old"] == 1_000
    assert counts(usage)["new"] > 50


@pytest.mark.parametrize("seed", range(5))
def test_whatever_comes_series_are_bounded_grow_only_and_add_up(seed):
    rng = random.Random(seed)
    usage = AdapterUsage(5)
    before: dict[str, float] = {}
    last: dict[str, float] = {}
    for number in range(3_000):
        label = f"a{int(rng.paretovariate(0.7)) % 200}"
        use(usage, label, was_found=rng.random() < 0.9)
        if number % 10:
            continue
        now = counts(usage)
        assert len(now) <= 2 * 5 + 1
        for series, value in now.items():
            assert value >= last.get(series, 0.0)
        last.update(now)
        before = now
    assert len(usage._others) <= 32 * 5
    assert sum(before.values()) <= 3_000
    assert {"a1", "a2"} <= before.keys()
