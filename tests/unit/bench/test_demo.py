"""The demonstration: six varied requests, answers compared token by token, a chart."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, Self

import pytest
from rich.console import Console

from lorax_bench import demo
from lorax_bench.demo import Sameness, Story, common_length, judge, make_workload, show
from lorax_bench.records import Record

WORKLOAD = make_workload(lambda text: list(range(1, 1 + len(text.split()))))


def answers(seconds: float, shift: int = 0) -> list[Record]:
    """Answers of which the longest ends after so many seconds."""
    longest = max(request.max_tokens for request in WORKLOAD.requests)
    return [
        Record(
            request=number, sent_s=0.0, prompt_tokens=len(request.prompt_ids),
            token_times_s=[
                seconds * (place + 1) / longest for place in range(request.max_tokens)
            ],
            # The last token of the first answer may differ.
            token_ids=[*range(request.max_tokens - 1), shift if not number else 0],
        )
        for number, request in enumerate(WORKLOAD.requests)
    ]  # fmt: skip


class Teacher:
    """Stands in for the worker that judges."""

    def __init__(self, judged: list[dict[str, Any]]) -> None:
        self.judged = judged
        self.asked: list[Any] = []

    def __call__(self, *arguments: Any) -> Teacher:
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *arguments: object) -> None:
        pass

    def ask(self, requests: list[Any]) -> list[dict[str, Any]]:
        self.asked = requests
        return self.judged


def judged_by(
    monkeypatch: pytest.MonkeyPatch, gaps: list[float], difference: float
) -> tuple[Sameness, Teacher]:
    each = {"gaps": [], "difference": 1e-5}
    teacher = Teacher([{"gaps": gaps, "difference": difference}, *[each] * 5])
    monkeypatch.setattr(demo, "WorkerPeer", teacher)
    return judge(Path("model"), WORKLOAD, answers(1.0, shift=5), answers(1.0)), teacher


def test_the_requests_vary() -> None:
    assert len(WORKLOAD.requests) == 6
    prompts = [len(request.prompt_ids) for request in WORKLOAD.requests]
    lengths = [request.max_tokens for request in WORKLOAD.requests]
    assert max(prompts) > 10 * min(prompts)
    assert max(lengths) > 10 * min(lengths)


def test_equal_answers_need_no_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "WorkerPeer", None)
    found = judge(Path("model"), WORKLOAD, answers(1.0), answers(9.0))
    assert found.ok
    assert "all 308 tokens are equal" in str(found)


def test_a_near_tie_is_the_same_output_and_no_more_than_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found, teacher = judged_by(monkeypatch, gaps=[3e-4], difference=1e-4)
    assert found.ok
    assert (found.num_equal, found.num_tokens) == (307, 308)
    assert teacher.asked[0]["token_ids"][-1] == 5
    found, _ = judged_by(monkeypatch, gaps=[3e-4, 2e-4], difference=1e-4)
    assert not found.ok


def test_what_rounding_does_not_explain_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = judged_by(monkeypatch, gaps=[5e-4], difference=1e-4)
    assert found.num_wrong == 1
    assert not found.ok


def test_common_length_is_up_to_the_first_that_differs() -> None:
    assert common_length([1, 2, 3], [1, 2, 4]) == 2
    assert common_length([1, 2, 3], [1, 9, 3]) == 1
    assert common_length([1, 2], [1, 2, 3]) == 2


def test_the_story_is_told_with_its_speed_up() -> None:
    story = Story(
        questions=["q"] * 6, answers=["an answer<|im_end|>and what comes after"] * 6,
        static=[answers(8.0), answers(12.0), answers(9.0)],
        ragged=[answers(1.0), answers(1.0), answers(1.0)],
        sameness=Sameness(num_tokens=308, num_equal=308, gaps=(), difference=0.0),
    )  # fmt: skip
    assert story.speed_up.of_medians == pytest.approx(9.0)
    output = io.StringIO()
    show(story, Console(file=output, width=130))
    told = output.getvalue()
    assert "9.00 times as fast (rounds 8.00 to 12.00)" in told
    assert "what comes after" not in told
    bars = [line.count("█") for line in told.splitlines() if "█" in line]
    assert len(bars) == 12
    assert bars[2] > bars[8] * 5
