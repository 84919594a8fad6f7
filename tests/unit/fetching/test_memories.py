"""Who was let in and what failed: for a limited time, without tokens."""

from __future__ import annotations

import pytest

from lorax_contract.adapters import AdapterRef, AdapterUnavailableError, Reason
from lorax_shard.fetching.access import AccessBook
from lorax_shard.fetching.negative import NegativeCache, NegativeSettings

REF, OTHER = AdapterRef.of("hub", "org/a"), AdapterRef.of("hub", "org/b")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_an_acceptance_holds_for_its_token_its_adapter_and_its_time(clock: Clock) -> None:
    book = AccessBook(60.0, now=clock)
    book.accept(REF, "hf_a")
    assert book.is_accepted(REF, "hf_a")
    assert not book.is_accepted(REF, "hf_b")
    assert not book.is_accepted(REF, None)
    assert not book.is_accepted(REF, "")
    assert not book.is_accepted(OTHER, "hf_a")
    clock.now = 60.0
    assert not book.is_accepted(REF, "hf_a")


def test_an_acceptance_can_be_taken_back(clock: Clock) -> None:
    book = AccessBook(60.0, now=clock)
    for token in ("hf_a", "hf_b"):
        book.accept(REF, token)
        book.accept(OTHER, token)
    book.refuse(REF, "hf_a")
    assert [book.is_accepted(REF, token) for token in ("hf_a", "hf_b")] == [False, True]
    book.forget(REF)
    assert not book.is_accepted(REF, "hf_b")
    assert book.is_accepted(OTHER, "hf_b")


def test_the_book_holds_no_token_and_is_bounded(clock: Clock) -> None:
    book = AccessBook(60.0, max_entries=2, now=clock)
    for number in range(3):
        book.accept(REF, f"hf_{number}")
    assert [book.is_accepted(REF, f"hf_{n}") for n in range(3)] == [False, True, True]
    assert "hf_" not in repr(vars(book))
    assert book.hash("hf_1") != AccessBook(60.0).hash("hf_1")


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


def test_the_cache_is_bounded_and_can_forget(clock: Clock) -> None:
    cache = NegativeCache(NegativeSettings(max_entries=2), now=clock)
    for key in ("a", "b", "b x"):
        cache.failed(key, error(Reason.CORRUPT))
    assert [cache.get(key) is None for key in ("a", "b", "b x")] == [True, False, False]
    cache.forget("b")
    assert cache.get("b") is cache.get("b x") is None
