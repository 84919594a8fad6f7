"""How decode rows are split: processors end together, whatever the lengths are."""

from __future__ import annotations

import random

import pytest

from lorax_shard.attention.backend import AttentionSpec
from lorax_shard.attention.triton import splits

PROCESSORS = 132
PROGRAMS = 8
PLAIN = AttentionSpec(1.0)


def counts(lens: list[int], spec: AttentionSpec = PLAIN, programs: int = PROGRAMS) -> list[int]:
    """Return how many splits each row has."""
    made = splits.by_length(lens, spec, programs, PROCESSORS)
    assert_complete(made, len(lens))
    return made.rows[:, 1].tolist()


def assert_complete(made: splits.RowSplits, num_rows: int) -> None:
    """Each row has its splits, all of them in their order and one after the other."""
    assert len(made.rows) == num_rows
    assert made.num == made.rows[:, 1].sum()
    for row, (first, count) in enumerate(made.rows.tolist()):
        assert made.splits[first : first + count].tolist() == [
            [row, number, count] for number in range(count)
        ]


def longest_queue(lens: list[int]) -> float:
    """Return what the last processor to end has read, over what each would if all read alike.

    Programs begin in their order, each where most has been read already, four on a processor.
    """
    made = splits.by_length(lens, PLAIN, PROGRAMS, PROCESSORS)
    places = [0.0] * (4 * PROCESSORS)
    for row, _, count in made.splits.tolist():
        for _ in range(PROGRAMS):
            places.sort()
            places[0] += lens[row] / count
    return max(places) * len(places) / (sum(lens) * PROGRAMS)


def test_one_row_is_split_as_far_as_there_is_to_read() -> None:
    assert counts([512]) == [8]
    assert counts([33]) == [1]
    assert counts([32_768]) == [49]
    assert counts([10_000_000], programs=1) == [splits.MOST_SPLITS]


def test_as_many_rows_as_processors_take_are_not_split() -> None:
    assert counts([512] * 64) == [1] * 64
    assert counts([512] * 256) == [1] * 256


def test_a_long_row_is_split_alone() -> None:
    found = counts([128] * 63 + [32_768])
    assert found[:63] == [1] * 63
    assert found[63] >= 32


@pytest.mark.parametrize("rules", [{"window": 512}, {"chunk": 512}])
def test_what_is_not_seen_is_not_split(rules: dict[str, int]) -> None:
    assert counts([100_352], AttentionSpec(1.0, **rules)) == counts([512])


@pytest.mark.parametrize(
    "lens",
    [
        [32_768, *[128] * 63],
        [8000, *[300] * 255],
        [random.Random(1).randint(100, 4000) for _ in range(256)],
        [random.Random(2).randint(1000, 30_000) for _ in range(20)],
    ],
)
def test_no_processor_reads_much_longer_than_the_others(lens: list[int]) -> None:
    assert longest_queue(lens) <= 2.0


def test_long_programs_begin_first() -> None:
    made = splits.by_length([10, 5000, 900, 20], PLAIN, PROGRAMS, 1)
    assert made.splits[:, 0].tolist() == [1, 2, 3, 0]


def test_a_fixed_number_of_splits_depends_on_the_number_of_rows_alone() -> None:
    made = splits.fixed(3, 2)
    assert_complete(made, 3)
    assert made.rows.tolist() == [[0, 2], [2, 2], [4, 2]]


def test_rows_of_no_length_have_a_split() -> None:
    assert counts([0, 0]) == [1, 1]
    assert counts([0, 7], AttentionSpec(1.0, chunk=4)) == [1, 1]
