"""The GPU check's end-to-end stage: a real shard process, the router's service, adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench.gpu_check import serving
from bench.gpu_check.loads import RequestLoad, checked
from bench.gpu_check.report import Report
from bench.gpu_check.requests import send_to_service
from tests.helpers.tiny_models import make_tokenizer


def test_requests_come_back_whole_through_router_and_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = []

    async def send(timed, load):
        sent.append(load.label)
        return await send_to_service(timed, load)

    monkeypatch.setattr(serving, "send_to_service", send)
    report = Report(tmp_path / "report.json")
    serving.run(report, small=True)
    (table,) = report.data["tables"]
    assert [row[1:3] for row in table["rows"]] == [
        ["3 x 12 in, 5 out, greedy", 0],
        ["3 x 12 in, 5 out, greedy", 2],
        ["2 x 12 in, 4 out, greedy", 0],
        ["2 x 12 in, 4 out, sampled", 0],
    ]
    assert sent == [label for row in table["rows"] for label in (row[1], row[1])], "each twice"
    for row, tokens in zip(table["rows"], (15, 15, 8, 8), strict=True):
        assert round(row[3] * row[4]) == tokens
        assert all(value > 0 for value in row[5:]), row
        assert row[11] < 100


def test_prompts_have_exactly_the_tokens_that_are_asked_for(tmp_path: Path) -> None:
    """Of words that are a token each; no two begin alike, so that no cache helps."""
    tokenizer = make_tokenizer(tmp_path)
    for num_tokens in (3, 12, 256):
        texts = RequestLoad(40, num_tokens, 1).texts(tokenizer)
        ids = [tokenizer.encode(text).ids for text in texts]
        assert {len(each) for each in ids} == {num_tokens}
        assert len({tuple(each[:3]) for each in ids}) == 40


def test_a_request_that_lacks_tokens_fails_the_stage() -> None:
    with pytest.raises(RuntimeError, match=r"1 of 2 requests got other than 5 tokens: \[4\]"):
        checked(RequestLoad(2, 1, 5), [5, 4], 1.0)
