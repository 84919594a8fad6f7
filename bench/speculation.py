"""Drafts looked up in a request's own text: what they save, as ratios within one run.

Two servers take turns, one that drafts and one that does not. Each prompt of ``drafted_prompts`` is answered greedily, one at a time for one
row, all at once for as many rows as asked for. Reported: tokens a second, the ratio of the two, how
many of the drafted tokens were kept, and whether the answers are the same.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.drafted_prompts import PROMPTS, DraftedPrompt
from tests.helpers.server import Server

NUM_NEW = 128
ROWS = (1, 32)
DRAFTED, ACCEPTED = (f"vllm:spec_decode_num_{what}_tokens_total" for what in ("draft", "accepted"))


@dataclass(slots=True)
class Turn:
    """What one server made of some prompts."""

    seconds: float = 0.0
    num_tokens: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    texts: list[str] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.num_tokens / self.seconds


def take_turn(server: Server, prompts: Sequence[DraftedPrompt], num_new: int) -> Turn:
    """Send the prompts at once."""
    before = counts(server)
    answers: list[dict[str, Any]] = [{}] * len(prompts)

    def ask(number: int) -> None:
        body = {
            "model": "base", "messages": [{"role": "user", "content": prompts[number].text}],
            "max_tokens": num_new, "temperature": 0,
        }  # fmt: skip
        answers[number] = server.post("/v1/chat/completions", body, timeout_s=1800)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(prompts))]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - start
    drafted, accepted = (b - a for a, b in zip(before, counts(server), strict=True))
    num_tokens = sum(each["usage"]["completion_tokens"] for each in answers)
    texts = [each["choices"][0]["message"]["content"] for each in answers]
    return Turn(seconds, num_tokens, int(drafted), int(accepted), texts)


def counts(server: Server) -> tuple[float, float]:
    """Return how many tokens were drafted, and kept, so far."""
    lines = server.get("/metrics").splitlines()
    found = {line.split("{")[0]: float(line.split()[-1]) for line in lines if line[:5] == "vllm:"}
    return found[DRAFTED], found[ACCEPTED]


def one_row(plain: Server, drafting: Server, num_new: int) -> list[tuple[Turn, Turn]]:
    """Answer each prompt alone, on one server and then on the other."""
    pairs = []
    for number, prompt in enumerate(PROMPTS):
        before, after = in_turns(plain, drafting, [prompt], num_new, swap=number % 2 == 1)
        pairs.append((before, after))
        kept = after.num_accepted / after.num_drafted if after.num_drafted else 0.0
        print(
            f"{prompt.kind:<8} {prompt.text[:42].splitlines()[0]!r:<46} {before.rate:6.1f} -> "
            f"{after.rate:6.1f} tokens/s  {after.rate / before.rate:5.2f}x  drafted "
            f"{after.num_drafted:4d}, kept {after.num_accepted:4d} ({kept:4.0%})  "
            f"{'same' if before.texts == after.texts else 'OTHER TEXT'}",
            flush=True,
        )
    return pairs


def in_turns(
    plain: Server, drafting: Server, prompts: Sequence[DraftedPrompt], num_new: int, *, swap: bool
) -> tuple[Turn, Turn]:
    """Take two turns, in an order that changes."""
    servers = (drafting, plain) if swap else (plain, drafting)
    first, second = (take_turn(server, prompts, num_new) for server in servers)
    return (second, first) if swap else (first, second)


def ratio(pairs: Sequence[tuple[Turn, Turn]]) -> float:
    """Return how much faster all answers together came."""
    before, after = (sum(pair[place].seconds for pair in pairs) for place in (0, 1))
    tokens = [sum(pair[place].num_tokens for pair in pairs) for place in (0, 1)]
    return (tokens[1] / after) / (tokens[0] / before)


def compare(
    num_drafted: int, *, num_new: int, rows: Sequence[int], rounds: int, extra: Sequence[str] = ()
) -> dict[int, float]:
    """Measure and print; return the ratio for each number of rows."""
    common = ["--served-model-name", "base", "--prefix-caching", "false"]
    drafts = ["--speculative-tokens", str(num_drafted), *extra]
    ratios = {}
    with Server(*common) as plain, Server(*common, *drafts) as drafting:
        for server in (plain, drafting):
            take_turn(server, PROMPTS[:2], 16)
        for num in rows:
            if num == 1:
                pairs = one_row(plain, drafting, num_new)
            else:
                prompts = [PROMPTS[number % len(PROMPTS)] for number in range(num)]
                pairs = [
                    in_turns(plain, drafting, prompts, num_new, swap=turn % 2 == 1)
                    for turn in range(rounds)
                ]
            each = [after.rate / before.rate for before, after in pairs]
            ratios[num] = ratio(pairs)
            drafted, kept = (
                sum(getattr(after, name) for _, after in pairs)
                for name in ("num_drafted", "num_accepted")
            )
            print(
                f"{num} rows: {ratios[num]:.2f}x tokens/s (each {min(each):.2f} to "
                f"{max(each):.2f}, median {statistics.median(each):.2f}), {kept} of {drafted} kept",
                flush=True,
            )
    return ratios


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8, help="of --speculative-tokens")
    parser.add_argument("--max-batch-size", type=int, default=None)
    parser.add_argument("--new", type=int, default=NUM_NEW)
    parser.add_argument("--rounds", type=int, default=3, help="for the many rows")
    parser.add_argument("--rows", type=int, nargs="*", default=list(ROWS))
    options = parser.parse_args()
    extra = []
    if options.max_batch_size is not None:
        extra = ["--speculation-max-batch-size", str(options.max_batch_size)]
    compare(
        options.tokens, num_new=options.new, rows=options.rows, rounds=options.rounds, extra=extra
    )


if __name__ == "__main__":
    main()
