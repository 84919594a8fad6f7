"""Where the end of a text stood before: the longest match, in a time that the text does not change."""

from __future__ import annotations

import random
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorax_shard.engine.earlier_places import LONGEST_MATCH, EarlierPlaces


def ids(values: list[int]) -> np.ndarray:
    return np.array(values, dtype=np.int64)


@pytest.mark.parametrize(
    ("known", "found"),
    [
        ([1, 2, 3, 4, 9, 1, 2], (2, 2)),
        # The latest of several places.
        ([1, 2, 3, 1, 2, 4, 1, 2], (5, 2)),
        # One that is alike for longer goes before a later one.
        ([7, 1, 2, 3, 8, 1, 2, 4, 7, 1, 2], (3, 3)),
        # It may reach into the end itself.
        ([1, 2, 1, 2], (2, 2)),
        ([5, 5, 5], (2, 2)),
        # Where no two tokens are alike the last one counts.
        ([2, 4, 2, 5, 3, 2], (3, 1)),
        ([1, 2, 3], (0, 0)),
        ([1, 1], (1, 1)),
        ([1, 2], (0, 0)),
        ([1], (0, 0)),
    ],
)
def test_the_place_most_like_the_end(known, found) -> None:
    assert EarlierPlaces().longest_match(ids(known)) == found


def longest_by_hand(known: list[int]) -> tuple[int, int]:
    best = (0, 0)
    for place in range(1, len(known)):
        length = 0
        while (
            length < min(place, LONGEST_MATCH) and known[place - 1 - length] == known[-1 - length]
        ):
            length += 1
        if length >= max(best[1], 1):
            best = (place, length)
    return best


@given(st.lists(st.integers(0, 3), min_size=1, max_size=32))
def test_it_is_the_latest_of_the_longest_however_the_text_came(known) -> None:
    growing = EarlierPlaces()
    for end in range(1, len(known) + 1):
        found = growing.longest_match(ids(known[:end]))
        assert found == longest_by_hand(known[:end])
    assert EarlierPlaces().longest_match(ids(known)) == longest_by_hand(known)


def test_a_text_that_outgrows_the_table() -> None:
    rng = random.Random(3)
    source = [rng.randrange(50_000) for _ in range(3_000)]
    places = EarlierPlaces()
    text = source[:10]
    places.longest_match(ids(text))
    for token_id in [*source[10:], 7, *source[500:520]]:
        text.append(token_id)
        places.longest_match(ids(text))
    assert places.longest_match(ids(text)) == (520, LONGEST_MATCH)


class Watched(np.ndarray):
    """Ids that count how many of them are read."""

    num_read = 0

    def __getitem__(self, at):
        found = super().__getitem__(at)
        Watched.num_read += np.size(found)
        return found


def reads_per_token(num_known: int) -> int:
    rng = random.Random(4)
    text = ids([rng.randrange(20) for _ in range(num_known + 50)]).view(Watched)
    places = EarlierPlaces()
    places.longest_match(text[:num_known])
    Watched.num_read = 0
    for end in range(num_known + 1, num_known + 51):
        places.longest_match(np.ndarray.__getitem__(text, slice(0, end)))
    return Watched.num_read // 50


def test_a_look_up_reads_no_more_of_a_long_text_than_of_a_short_one() -> None:
    # In both there are more places than are compared.
    assert reads_per_token(200_000) <= 1.1 * reads_per_token(20_000) < 2_000


def test_what_is_kept_of_a_text_is_a_few_bytes_a_token() -> None:
    text = ids([number * 7919 % 49_157 for number in range(100_000)])
    tracemalloc.start()
    try:
        places = EarlierPlaces()
        places.longest_match(text)
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 48 * len(text)
