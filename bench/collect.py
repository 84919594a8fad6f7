"""What each drawn token costs after it is drawn, in the shard and in the router.

``emit``: rank 0 makes the texts, decides what ends and writes the outcome's columns. Then the
conversions of the plan and the outcome, on both sides of the wire and without its bytes, and
``publish``: the router hands the tokens to what writes 256 streams.
Medians per step, and what that is for a token.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from time import perf_counter

import numpy as np
from bench.router import make_scheduler, make_spec
from tests.helpers.default_model import default_model_dir
from tokenizers import Tokenizer

from lorax_bench.steps.wire import make_plan
from lorax_contract.step import (
    NewRow,
    RequestId,
    RequestSpec,
    SamplingParams,
    StepOutcome,
    StoppingParams,
)
from lorax_proto import generate_pb2 as pb
from lorax_proto.convert import (
    outcome_from_proto,
    outcome_to_proto,
    step_from_proto,
    step_to_proto,
)
from lorax_router.service.engine.loop import EngineLoop
from lorax_router.shards.fake.shard import FakeShard
from lorax_shard.engine.detokenizer import Detokenizer, TokenReader
from lorax_shard.engine.drafts import NO_DRAFT
from lorax_shard.engine.emitter import Emitter
from lorax_shard.engine.inputs import RowWork
from lorax_shard.engine.outcome import OutcomeBuilder
from lorax_shard.engine.output import RowOutput
from lorax_shard.engine.rows import Row, make_row
from lorax_shard.sampling.sampled import SampledTokens

NUM_ROWS = 256
NUM_STEPS = 200
NUM_DRAFTED = 3
ROOT = Path(__file__).parent.parent
KINDS = {"plain": {}, "one stop string": {"stop_sequences": ("\nUser:",)}}


class Texts:
    """Tokens of this project's pages, from a place of its own for each row."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        pages = sorted((ROOT / "docs").glob("*.md"))
        self._ids = tokenizer.encode("\n".join(page.read_text() for page in pages)).ids

    def read_by(self, reader: TokenReader) -> None:
        """Have all tokens read once, as they are in a server that ran for a while."""
        for token_id in set(self._ids):
            reader.piece(token_id)

    def of_rows(self, num_tokens: int) -> Iterator[list[list[int]]]:
        """Return so many next tokens of each row, step after step."""
        for step in itertools.count():
            starts = (997 * row + step * num_tokens for row in range(NUM_ROWS))
            yield [[self._id(start + at) for at in range(num_tokens)] for start in starts]

    def _id(self, index: int) -> int:
        return self._ids[index % len(self._ids)]


def make_rows(detokenizer: Detokenizer, vocab_size: int, **stopping: object) -> list[Row]:
    """Return rows that outlive the measurement."""
    rows = []
    for number in range(1, NUM_ROWS + 1):
        spec = RequestSpec(
            request_id=RequestId(50_000 + number),
            prompt_ids=[number + 100],
            sampling=SamplingParams(),
            stopping=StoppingParams(max_new_tokens=10**6, **stopping),  # type: ignore[arg-type]
        )
        row = make_row(NewRow(spec, ()), vocab_size=vocab_size)
        row.make_output = partial(RowOutput, detokenizer, spec.prompt_ids, spec.stopping, (2,))
        rows.append(row)
    return rows


def measure_emit(
    emitter: Emitter, rows: list[Row], steps: Iterator[list[list[int]]], num_tokens: int
) -> tuple[list[float], StepOutcome]:
    """Return the seconds of each step, and the last one's outcome; all tokens are kept."""
    seconds = []
    for seq, ids in enumerate(itertools.islice(steps, NUM_STEPS)):
        drawing = [
            RowWork(row, 1, np.array(own[:-1]) if num_tokens > 1 else NO_DRAFT)
            for row, own in zip(rows, ids, strict=True)
        ]
        flat = [token_id for own in ids for token_id in own]
        sampled = SampledTokens(flat, [-0.5] * len(flat), [None] * len(flat))
        out = OutcomeBuilder(seq)
        start = perf_counter()
        kept, _ = emitter.emit(drawing, sampled, out)
        seconds.append(perf_counter() - start)
        assert kept == [num_tokens] * NUM_ROWS
    return seconds, out.outcome


def measure(call: Callable[[], object]) -> list[float]:
    """Return the seconds of each call."""
    seconds = []
    for _ in range(NUM_STEPS):
        start = perf_counter()
        call()
        seconds.append(perf_counter() - start)
    return seconds


def measure_conversions(outcome: StepOutcome) -> dict[str, list[float]]:
    """Return the seconds of each conversion of a step in which each row draws a token."""
    plan = make_plan(NUM_ROWS)
    request, reply = step_to_proto(plan, 1), outcome_to_proto(outcome, pb.DecodeResponse)
    return {
        "shard: step_from_proto": measure(lambda: step_from_proto(request)),
        "shard: outcome_to_proto": measure(lambda: outcome_to_proto(outcome, pb.DecodeResponse)),
        "router: step_to_proto": measure(lambda: step_to_proto(plan, 1)),
        "router: outcome_from_proto": measure(lambda: outcome_from_proto(reply, 1)),
    }


async def measure_publish(outcome: StepOutcome) -> list[float]:
    """Return the seconds of handing one step's tokens to what writes them."""
    loop = EngineLoop(FakeShard(), make_scheduler(1))
    rng = random.Random(0)
    handed: list[int] = []
    for row_id in outcome.row_ids:
        loop.submit(make_spec(row_id, rng)).hand_to(lambda chunk: handed.extend(chunk.tokens.ids))
    accepted = [True] * NUM_ROWS
    seconds = []
    for _ in range(NUM_STEPS):
        start = perf_counter()
        loop._publish(outcome, accepted, start)
        seconds.append(perf_counter() - start)
    assert len(handed) == NUM_STEPS * NUM_ROWS
    return seconds


def main() -> None:
    """Print the figures as a table, and as JSON with --json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(default_model_dir() / "tokenizer.json"))
    texts, emitter = Texts(tokenizer), Emitter(Detokenizer(tokenizer))
    texts.read_by(emitter.detokenizer)
    vocab_size = tokenizer.get_vocab_size()
    figures: dict[str, tuple[float, int]] = {}

    def note(name: str, seconds: list[float], num_tokens: int = NUM_ROWS) -> None:
        figures[name] = statistics.median(seconds) * 1e3, num_tokens

    for kind, stopping in KINDS.items():
        rows = make_rows(emitter.detokenizer, vocab_size, **stopping)
        seconds, outcome = measure_emit(emitter, rows, texts.of_rows(1), 1)
        note(f"shard: emit, {kind}", seconds)
    rows = make_rows(emitter.detokenizer, vocab_size)
    seconds, _ = measure_emit(emitter, rows, texts.of_rows(1 + NUM_DRAFTED), 1 + NUM_DRAFTED)
    note(f"shard: emit, {NUM_DRAFTED} drafted", seconds, NUM_ROWS * (1 + NUM_DRAFTED))
    for name, seconds in measure_conversions(outcome).items():
        note(name, seconds)
    note("router: publish", asyncio.run(measure_publish(outcome)))
    print(f"| {NUM_ROWS} rows | ms a step | us a token |")
    print("| --- | --- | --- |")
    for name, (milliseconds, num_tokens) in figures.items():
        print(f"| {name} | {milliseconds:.3f} | {milliseconds * 1e3 / num_tokens:.2f} |")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
