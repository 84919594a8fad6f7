"""Shares are disjoint, complete, and as even as they can be."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorax_shard.parallel.partition import CannotSplitError, Span, share_heads, share_of


@given(st.integers(1, 500), st.integers(1, 16))
def test_shares_follow_each_other_and_differ_by_one_at_most(size: int, world_size: int) -> None:
    if size < world_size:
        with pytest.raises(CannotSplitError, match=f"{size} items"):
            share_of(size, 0, world_size)
        return
    shares = [share_of(size, rank, world_size) for rank in range(world_size)]
    assert shares[0].start == 0
    assert shares[-1].stop == size
    assert all(a.stop == b.start for a, b in itertools.pairwise(shares))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(st.integers(1, 8), st.integers(1, 6), st.integers(1, 12))
def test_every_query_head_has_one_rank_and_its_key_beside_it(
    num_keys: int, per_key: int, world_size: int
) -> None:
    num_queries = num_keys * per_key
    if world_size > num_queries:
        with pytest.raises(CannotSplitError, match="query heads"):
            share_heads(num_queries, num_keys, 0, world_size)
        return
    shares = [share_heads(num_queries, num_keys, r, world_size) for r in range(world_size)]
    held = [head for share in shares for head in range(share.queries.start, share.queries.stop)]
    assert held == list(range(num_queries))
    for share in shares:
        assert len(share.queries) % len(share.keys) == 0
        ratio = len(share.queries) // len(share.keys)
        for place, query in enumerate(range(share.queries.start, share.queries.stop)):
            # What an attention kernel assumes is what the full model has.
            assert share.keys.start + place // ratio == query // per_key


def test_smollm2s_heads_on_two_three_and_four_ranks() -> None:
    assert share_heads(9, 3, 0, 2).queries == Span(0, 6)
    assert share_heads(9, 3, 1, 2).keys == Span(2, 3)
    assert [len(share_heads(9, 3, rank, 3).queries) for rank in range(3)] == [3, 3, 3]
    assert [len(share_heads(9, 3, rank, 4).queries) for rank in range(4)] == [2, 1, 3, 3]


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(CannotSplitError, match="do not divide"):
        share_heads(7, 3, 0, 2)
