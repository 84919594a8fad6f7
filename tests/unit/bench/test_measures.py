"""Figures against records computed by hand."""

from __future__ import annotations

import pytest

from lorax_bench.measures import Spread, by_adapter, figures, ratio
from lorax_bench.records import Record

RECORDS = [
    Record(request=0, adapter=0, sent_s=0.0, token_times_s=[1.0, 2.0, 4.0], prompt_tokens=10),
    Record(request=1, adapter=1, sent_s=1.0, token_times_s=[4.0, 5.0], prompt_tokens=20),
    Record(request=2, sent_s=2.0, token_times_s=[3.0], prompt_tokens=5, error="it broke"),
    Record(request=3, adapter=1, sent_s=2.0, prompt_tokens=5, error="HTTP 429: too many"),
]


def test_rates_are_over_the_time_from_the_first_sending_to_the_last_token() -> None:
    found = figures(RECORDS)
    assert found.seconds == 5.0
    assert found.output_tokens_per_s == 6 / 5
    assert found.requests_per_s == 2 / 5
    assert (found.num_requests, found.num_failed) == (4, 2)
    assert (found.num_prompt_tokens, found.num_output_tokens) == (40, 6)


def test_the_time_before_the_first_request_is_no_part_of_a_run() -> None:
    late = [Record(request=0, sent_s=10.0, token_times_s=[12.0])]
    assert figures(late).seconds == 2.0


def test_times_are_of_requests_that_did_not_fail() -> None:
    found = figures(RECORDS)
    assert found.ttft is not None
    assert found.inter_token is not None
    assert found.end_to_end is not None
    assert (found.ttft.num, found.ttft.mean_s, found.ttft.at(50)) == (2, 2.0, 2.0)
    # Gaps 1, 2, 1.
    assert (found.inter_token.num, found.inter_token.at(50), found.inter_token.at(100)) == (3, 1, 2)
    assert (found.end_to_end.at(0), found.end_to_end.at(100)) == (4.0, 4.0)


def test_errors_are_counted_in_words() -> None:
    assert figures(RECORDS * 2).errors == {"it broke": 2, "HTTP 429: too many": 2}


def test_percentiles_are_interpolated() -> None:
    spread = Spread.of([0.0, 1.0, 2.0, 3.0, 10.0])
    assert spread is not None
    assert [spread.at(each) for each in (0, 25, 50, 90, 100)] == pytest.approx([0, 1, 2, 7.2, 10])


def test_there_are_no_percentiles_of_nothing() -> None:
    assert Spread.of([]) is None
    found = figures([RECORDS[3]])
    assert (found.ttft, found.inter_token, found.end_to_end) == (None, None, None)
    assert (found.output_tokens_per_s, found.requests_per_s) == (0.0, 0.0)


def test_an_adapter_has_its_share_of_the_whole_run() -> None:
    each = by_adapter(RECORDS)
    assert list(each) == [None, 0, 1]
    assert each[0].output_tokens_per_s == 3 / 5
    assert (each[1].num_requests, each[1].num_failed) == (2, 1)
    total = sum(part.output_tokens_per_s for part in each.values())
    assert total == pytest.approx(figures(RECORDS).output_tokens_per_s)


def test_a_ratio_is_of_the_medians_and_has_the_bounds_of_its_rounds() -> None:
    found = ratio([90.0, 80.0, 70.0], [100.0, 80.0, 100.0])
    assert found.of_medians == 0.8
    assert found.of_rounds == pytest.approx((0.9, 1.0, 0.7))
    assert found.bounds == pytest.approx((0.7, 1.0))


@pytest.mark.parametrize("pair", [([], []), ([1.0], [1.0, 2.0])])
def test_a_ratio_needs_rounds_of_both(pair: tuple[list[float], list[float]]) -> None:
    with pytest.raises(ValueError, match="rounds"):
        ratio(*pair)
