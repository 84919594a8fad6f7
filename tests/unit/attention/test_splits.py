"""How decode rows are split: processors end together, whatever the lengths are."""

from __future__ import annotations

import random

import pytest

from lorax_shard.attention.backend import AttentionSpec
from lorax_shard.attention.triton import splits

PROCESSORS = 132
PROGRAMS = 8
PLAIN = AttentionSpec(1.0)


def decodes(lens: list[int], spec: AttentionSpec = PLAIN, **sizes: int) -> splits.TileSplits:
    """Return the splits of decode rows."""
    sizes = {"programs": PROGRAMS, "num_processors": PROCESSORS, **sizes}
    made = splits.by_length([1] * len(lens), lens, 1, spec, splits.DECODE, **sizes)
    assert_complete(made, [1] * len(lens), 1)
    return made


def prompts(query_lens: list[int], context_lens: list[int], block_q: int) -> list[list[int]]:
    """Return of the tiles of each prompt into how many they are split."""
    sizes = {"programs": PROGRAMS, "num_processors": PROCESSORS}
    made = splits.by_length(query_lens, context_lens, block_q, PLAIN, splits.PROMPT, **sizes)
    assert_complete(made, query_lens, block_q)
    of_query = iter(made.queries[:, 1].tolist())
    return [[next(of_query) for _ in range(num)][::block_q] for num in query_lens]


def counts(lens: list[int], spec: AttentionSpec = PLAIN, **sizes: int) -> list[int]:
    """Return how many splits each decode row has."""
    return decodes(lens, spec, **sizes).queries[:, 1].tolist()


def assert_complete(made: splits.TileSplits, query_lens: list[int], block_q: int) -> None:
    """Each query has its splits, all of them in their order and one after the other."""
    queries = [(row, at) for row, num in enumerate(query_lens) for at in range(num)]
    assert len(made.queries) == len(queries)
    used = set()
    for (row, at), (place, count) in zip(queries, made.queries.tolist(), strict=True):
        first, within = divmod(place, block_q)
        tile = at // block_q * block_q
        assert within == at - tile
        assert made.splits[first : first + count].tolist() == [
            [row, tile, number, count] for number in range(count)
        ]
        used |= {*range(first, first + count)}
    assert used == {*range(made.num)}
    assert made.is_split == (max(made.queries[:, 1]) > 1)


def longest_queue(lens: list[int]) -> float:
    """Return what the last processor to end has read, over what each would if all read alike.

    Programs begin in their order, each where most has been read already, four on a processor.
    """
    made = decodes(lens)
    places = [0.0] * (4 * PROCESSORS)
    for row, _, _, count in made.splits.tolist():
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
    made = decodes([10, 5000, 900, 20], num_processors=1)
    assert made.splits[:, 0].tolist() == [1, 2, 3, 0]


def test_a_fixed_number_of_splits_depends_on_the_number_of_rows_alone() -> None:
    made = splits.fixed([1, 1, 1], 1, 2)
    assert_complete(made, [1, 1, 1], 1)
    assert made.queries.tolist() == [[0, 2], [2, 2], [4, 2]]
    assert_complete(splits.fixed([9, 2, 8], 4, 3), [9, 2, 8], 4)


def test_long_prompts_are_not_split() -> None:
    assert prompts([2048], [2048], 32) == [[1] * 64]
    assert prompts([37, 512], [37, 512], 32) == [[1] * 2, [1] * 16]


def test_few_queries_behind_a_long_context_are_split() -> None:
    """The end of a prompt whose beginning is cached, and drafts that are checked."""
    assert prompts([5], [300], 32) == [[1]]
    assert prompts([5], [8192], 32) == [[16]]
    assert prompts([5, 5], [8192, 100], 32) == [[16], [1]]
    assert prompts([40], [8192], 32) == [[8, 8]]


def test_rows_of_no_length_have_a_split() -> None:
    assert counts([0, 0]) == [1, 1]
    assert counts([0, 7], AttentionSpec(1.0, chunk=4)) == [1, 1]
