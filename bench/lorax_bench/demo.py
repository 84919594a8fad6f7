"""The story of continuous batching on six requests: one padded batch beside a ragged one.

A static batch pads all prompts to the longest, and its rows run until the longest answer has
ended. This server computes the same tokens in one unpadded row, and a request leaves with its
last token. Both get the same ids; the answers are compared token by token.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from lorax_bench.apis import Lorax
from lorax_bench.drive import Target, drive
from lorax_bench.measures import Ratio, ratio
from lorax_bench.peers.worker_peer import PeerFailed, WorkerPeer
from lorax_bench.records import Record
from lorax_bench.requests import BenchRequest, Workload
from lorax_bench.serve import started

# A served token that is not the model's choice may be so much less likely, in units of the
# largest difference that rounding made in the same run; and only so many may be.
_TOLERANCE, _MAX_NEAR_TIES = 4.0, 1
_BAR = 48
_GOODS = ("tea", "rope", "maps", "lamps", "salt", "paper", "cloth", "tin")
_PORTS = ("Lisbon", "Oslo", "Genoa", "Riga", "Cadiz", "Bergen")


def _ledger(lines: int) -> str:
    """Return a text of so many lines that does not repeat itself."""
    return "\n".join(
        f"{number}. {7 * number % 83 + 2} boxes of {_GOODS[number % 8]} "
        f"from {_PORTS[number * 5 % 6]}, berth {number * 11 % 37}."
        for number in range(1, lines + 1)
    )


QUESTIONS: tuple[tuple[str, int], ...] = (
    ("What is the capital of France?", 12),
    (f"Summarise this ledger in one sentence.\n{_ledger(48)}", 24),
    ("Write a story about a lighthouse keeper who learns to sail.", 160),
    ("Translate to French: the sea is calm tonight, and nobody is awake.", 16),
    (f"Which goods appear most often?\n{_ledger(6)}", 32),
    ("Give three reasons to learn to swim, a sentence each.", 64),
)
"""What is asked, and how many tokens the answer has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sameness:
    """How the answers of both compare."""

    num_tokens: int
    num_equal: int
    """Tokens up to the first that differs, of all requests."""
    gaps: tuple[float, ...]
    """Of tokens of ours that are not the model's choice, in logits."""
    difference: float
    """The largest that rounding alone made."""

    @property
    def num_wrong(self) -> int:
        """Tokens that no rounding explains."""
        return sum(gap > _TOLERANCE * self.difference for gap in self.gaps)

    @property
    def ok(self) -> bool:
        """Whether both gave the same answers, near ties aside."""
        return not self.num_wrong and len(self.gaps) <= _MAX_NEAR_TIES

    def __str__(self) -> str:
        if self.num_equal == self.num_tokens:
            return f"the same output: all {self.num_tokens} tokens are equal"
        return (
            f"{self.num_equal} of {self.num_tokens} tokens are equal before answers part; "
            f"{len(self.gaps)} of ours are not the model's choice, {self.num_wrong} of them by "
            f"more than rounding explains (largest difference {self.difference:.1e})"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """What the demonstration came to."""

    questions: Sequence[str]
    answers: Sequence[str]
    static: list[list[Record]]
    ragged: list[list[Record]]
    """Of each round."""
    sameness: Sameness

    @property
    def speed_up(self) -> Ratio:
        """How many times as long the static batch took."""
        return ratio(
            [seconds(records) for records in self.static],
            [seconds(records) for records in self.ragged],
        )


def seconds(records: Sequence[Record]) -> float:
    """Return when the last answer ended."""
    return max(record.end_to_end_s or 0.0 for record in records)


def tell(rounds: int = 3, options: Sequence[str] = ()) -> Story:
    """Run both in turns and judge the answers."""
    with started(["--prefix-caching", "false", *options]) as server:
        tokenizer = _tokenizer(server.model_dir)
        workload = make_workload(lambda text: list(tokenizer.encode(text).ids))
        target = Target(
            url=server.url, api=Lorax(decode=lambda ids: _decoded(tokenizer, ids)), timeout_s=900.0
        )
        work = {"model": str(server.model_dir), "adapters": [], "batch_size": len(QUESTIONS)}
        with WorkerPeer(Path(sys.executable), "static.py", work) as static:

            def ragged(load: Workload) -> list[Record]:
                return asyncio.run(drive(target, load))

            for answer in (ragged, static.run):
                answer(_few_tokens(workload))
            found: dict[str, list[list[Record]]] = {"static": [], "ragged": []}
            for _ in range(rounds):
                found["static"].append(_whole(static.run(workload)))
                found["ragged"].append(_whole(ragged(workload)))
        sameness = judge(server.model_dir, workload, found["ragged"][-1], found["static"][-1])
    ids = [record.token_ids for record in found["ragged"][-1]]
    return Story(
        questions=[text for text, _ in QUESTIONS],
        answers=[_decoded(tokenizer, each) for each in ids],
        sameness=sameness, **found,
    )  # fmt: skip


def make_workload(encode: Callable[[str], list[int]]) -> Workload:
    """Return the six requests, as the model's chats are written."""
    requests = tuple(
        BenchRequest(
            prompt_ids=tuple(
                encode(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n")
            ),
            max_tokens=num,
        )
        for text, num in QUESTIONS
    )
    return Workload(name="demo", requests=requests)


def judge(
    model_dir: Path, workload: Workload, ours: Sequence[Record], theirs: Sequence[Record]
) -> Sameness:
    """Compare answers; the stock model judges where they differ."""
    num_tokens = sum(len(record.token_ids) for record in ours)
    pairs = [(one.token_ids, other.token_ids) for one, other in zip(ours, theirs)]
    num_equal = sum(common_length(one, other) for one, other in pairs)
    if num_equal == num_tokens:
        return Sameness(num_tokens=num_tokens, num_equal=num_equal, gaps=(), difference=0.0)
    asked = [
        {"prompt_ids": request.prompt_ids, "token_ids": one, "reference_ids": other}
        for request, (one, other) in zip(workload.requests, pairs)
    ]
    with WorkerPeer(Path(sys.executable), "teacher.py", {"model": str(model_dir)}) as teacher:
        judged = teacher.ask(asked)
    return Sameness(
        num_tokens=num_tokens, num_equal=num_equal,
        gaps=tuple(gap for each in judged for gap in each["gaps"]),
        difference=max(each["difference"] for each in judged),
    )  # fmt: skip


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many tokens two answers share from their start."""
    for place, (left, right) in enumerate(zip(one, other)):
        if left != right:
            return place
    return min(len(one), len(other))


def show(story: Story, console: Console) -> None:
    """Print the answers, a chart of both batches, and the speed-up."""
    console.print("[bold]Six requests, one padded batch beside a ragged one[/]")
    records = story.ragged[-1]
    for question, answer, record in zip(story.questions, story.answers, records):
        console.print(
            f"{record.prompt_tokens:>5} -> {record.num_tokens:>3} tokens  "
            f"{_short(question, 44):<44}  {_short(answer, 60)}",
            markup=False, highlight=False,
        )  # fmt: skip
    whole = seconds(story.static[-1])
    for title, rounds, colour in (
        ("static, padded", story.static, "red"),
        ("ragged, continuous (this server)", story.ragged, "green"),
    ):
        console.print(f"\n{title}", style="bold")
        for number, record in enumerate(rounds[-1], 1):
            end = record.end_to_end_s or 0.0
            bar = "█" * max(1, round(_BAR * end / whole))
            console.print(f"  {number} [{colour}]{bar:<{_BAR}}[/] {end:6.2f} s", highlight=False)
    medians = [
        statistics.median(seconds(each) for each in rounds)
        for rounds in (story.static, story.ragged)
    ]
    found = story.speed_up
    low, high = found.bounds
    console.print(
        f"\n{medians[0]:.2f} s and {medians[1]:.2f} s: [bold]{found.of_medians:.2f} times as "
        f"fast[/] (rounds {low:.2f} to {high:.2f})",
        highlight=False,
    )
    console.print(str(story.sameness), style="green" if story.sameness.ok else "red")


def _whole(records: list[Record]) -> list[Record]:
    if errors := [record.error for record in records if record.error]:
        raise PeerFailed(f"a request of the demonstration failed: {errors[0]}")
    return records


def _few_tokens(workload: Workload) -> Workload:
    requests = tuple(
        BenchRequest(prompt_ids=each.prompt_ids[:16], max_tokens=2) for each in workload.requests
    )
    return Workload(name="warm", requests=requests)


def _short(text: str, num: int) -> str:
    line = " ".join(text.partition("<|im_end|>")[0].split())
    return line if len(line) <= num else line[: num - 1] + "…"


def _tokenizer(model_dir: Path) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(model_dir / "tokenizer.json"))


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False))
