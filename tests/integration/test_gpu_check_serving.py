"""The GPU check's end-to-end stage: a real shard process, the router's service, adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench.gpu_check import serving
from bench.gpu_check.report import Report
from bench.gpu_check.requests import RequestLoad, checked


def test_requests_come_back_whole_through_router_and_shard(tmp_path: Path) -> None:
    report = Report(tmp_path / "report.json")
    serving.run(report, small=True)
    (table,) = report.data["tables"]
    assert [row[:2] for row in table["rows"]] == [["service", 0], ["service", 2]]
    for _, _, seconds, tokens_s in table["rows"]:
        assert round(seconds * tokens_s) == serving.SMALL.num_requests * serving.SMALL.output_tokens


def test_a_request_that_lacks_tokens_fails_the_stage() -> None:
    with pytest.raises(RuntimeError, match=r"1 of 2 requests got other than 5 tokens: \[4\]"):
        checked(RequestLoad(2, 1, 5), [5, 4], 1.0)
