"""What failed is remembered for a limited time; tokens are not."""

from __future__ import annotations

import pytest

from lorax_contract.adapters import AdapterUnavailableError, Reason
from lorax_shard.fetching.negative import NegativeCache, NegativeSettings
from lorax_shard.fetching.tokens import TokenHash


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_what_stands_for_a_token_tells_nothing_of_it() -> None:
    hashed = TokenHash()
    assert hashed("hf_a") == hashed("hf_a") != hashed("hf_b")
    assert hashed("hf_a") != TokenHash()("hf_a")
    assert hashed(None) == "" != hashed("")
    assert "hf_a" not in hashed("hf_a")


def error(reason: Reason, retry_after_s: float | None = None) -> AdapterUnavailableError:
    return AdapterUnavailableError(reason, "why", retry_after_s=retry_after_s)


RULES = NegativeSettings(
    passing_first_s=1.0, passing_most_s=8.0, permanent_first_s=100.0, permanent_most_s=400.0
)


@pytest.mark.parametrize(
    ("reason", "pauses"),
    [
        (Reason.TRANSIENT, [1, 2, 4, 8, 8]),
        (Reason.CRASHED, [1, 2, 4, 8, 8]),
        (Reason.CORRUPT, [100, 200, 400, 400]),
        (Reason.NOT_FOUND, [100, 200, 400, 400]),
    ],
)
def test_pauses_grow_to_a_bound(clock: Clock, reason: Reason, pauses: list[float]) -> None:
    cache = NegativeCache(RULES, now=clock)
    for pause in pauses:
        cache.failed("key", error(reason))
        known = cache.get("key")
        assert known is not None
        assert (known.reason, known.retry_after_s) == (reason, pause)
        clock.now += pause
        assert cache.get("key") is None


def test_a_success_or_another_kind_of_failure_starts_anew(clock: Clock) -> None:
    cache = NegativeCache(RULES, now=clock)
    cache.failed("key", error(Reason.TRANSIENT))
    cache.failed("key", error(Reason.TRANSIENT))
    cache.failed("key", error(Reason.CORRUPT))
    known = cache.get("key")
    assert known is not None
    assert known.retry_after_s == 100
    cache.succeeded("key")
    assert cache.get("key") is None


def test_what_the_source_asks_for_is_kept_to_within_the_bound(clock: Clock) -> None:
    cache = NegativeCache(RULES, now=clock)
    for asked, kept in ((5.0, 5.0), (1e9, 8.0)):
        cache.succeeded("key")
        cache.failed("key", error(Reason.TRANSIENT, asked))
        known = cache.get("key")
        assert known is not None
        assert known.retry_after_s == kept


def test_the_cache_is_bounded(clock: Clock) -> None:
    cache = NegativeCache(NegativeSettings(max_entries=2), now=clock)
    for key in "abc":
        cache.failed(key, error(Reason.CORRUPT))
    assert [cache.get(key) is None for key in "abc"] == [True, False, False]
