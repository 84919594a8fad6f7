from lorax_shard.attention.sdpa import _GROUP_COST_BLOCKS, _split_by_count


def test_rows_of_like_length_stay_one_group_in_order() -> None:
    assert _split_by_count([5, 7, 6, 5], max_blocks=28) == [[0, 1, 2, 3]]


def test_a_long_row_does_not_pad_the_short_ones() -> None:
    counts = [3, 500, 4, 2]
    assert _split_by_count(counts, max_blocks=400) == [[1], [2, 0, 3]]


def test_padding_is_bounded() -> None:
    counts = [(i * 37) % 211 + 1 for i in range(120)]
    groups = _split_by_count(counts, max_blocks=2000)
    assert sorted(row for group in groups for row in group) == list(range(120))
    for group in groups:
        most = max(counts[row] for row in group)
        assert sum(most - counts[row] for row in group) <= _GROUP_COST_BLOCKS
        assert most * len(group) <= 2000


def test_a_group_gathers_no_more_than_it_may() -> None:
    assert _split_by_count([6, 6, 6, 6, 6], max_blocks=12) == [[0, 1], [2, 3], [4]]
    assert _split_by_count([9, 9], max_blocks=5) == [[0], [1]]
