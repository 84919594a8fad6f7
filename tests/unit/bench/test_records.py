"""Requests that no server could answer are refused; a record's figures follow from its times."""

from __future__ import annotations

import pytest

from lorax_bench.records import Record
from lorax_bench.requests import BenchRequest, Workload

ONE = BenchRequest(prompt_ids=(5, 6), max_tokens=3)


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"prompt_ids": ()}, "prompt_ids"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"at_s": -1.0}, "at_s"),
    ],
)
def test_a_request_that_cannot_be_answered_is_refused(values: dict[str, object], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        BenchRequest(**{"prompt_ids": (1,), "max_tokens": 1, **values})  # type: ignore[arg-type]


def test_a_workload_counts_its_tokens() -> None:
    load = Workload(name="two", requests=(ONE, BenchRequest(prompt_ids=(7,), max_tokens=9)))
    assert (load.num_prompt_tokens, load.num_output_tokens) == (3, 12)


@pytest.mark.parametrize(
    "values",
    [
        {"requests": ()},
        {"requests": (ONE,), "concurrency": 0},
        {"requests": (BenchRequest(prompt_ids=(1,), max_tokens=1, adapter=2),), "num_adapters": 2},
    ],
)
def test_a_workload_that_cannot_run_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        Workload(name="bad", **values)  # type: ignore[arg-type]


def test_a_record_derives_its_times() -> None:
    record = Record(request=0, sent_s=1.0, token_times_s=[1.5, 1.75, 2.75])
    assert record.num_tokens == 3
    assert record.ttft_s == 0.5
    assert record.gaps_s == [0.25, 1.0]
    assert record.end_to_end_s == 1.75


def test_a_record_without_tokens_has_no_times() -> None:
    record = Record(request=0, sent_s=1.0, error="the server closed the connection")
    assert (record.ttft_s, record.gaps_s, record.end_to_end_s) == (None, [], None)
