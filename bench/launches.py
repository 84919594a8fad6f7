"""How soon one step follows another where computing costs nothing: what a shard does beside it.

A model that computes nothing and whose few logits are drawn from at once; rows that sample, and
rows that do not; texts made by the default model's tokenizer. Plans come as a router sends them,
as many at once as ``--depth`` says, the next when an outcome is there. Reported: milliseconds from one forward pass to
the next, medians of rounds that alternate; and where they go, by part.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import statistics
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from tests.helpers.default_model import default_model_dir
from tokenizers import Tokenizer

from lorax_contract.step import (
    BlockId,
    NewRow,
    RequestId,
    RequestSpec,
    SamplingParams,
    StepPlan,
    StoppingParams,
    WarmupSpec,
)
from lorax_shard.attention.backend import StepMetadata
from lorax_shard.engine.engine import Engine
from lorax_shard.engine.memory import PoolSettings
from lorax_shard.rpc.queue import CommandQueue

# Of so few tokens, the first of which are special, that to draw one takes no time.
VOCAB_SIZE, NUM_SPECIAL = 64, 17
NUM_PROMPT, BLOCK_SIZE = 16, 16
KINDS = {
    "greedy": SamplingParams(),
    "top-p": SamplingParams(do_sample=True, temperature=0.8, top_p=0.95, seed=7),
    "penalties": SamplingParams(
        do_sample=True, temperature=0.8, top_p=0.95, top_k=50, repetition_penalty=1.1,
        frequency_penalty=0.1, seed=7,
    ),
}  # fmt: skip


class NoModel:
    """Implements PagedModel; computes nothing and notes when it is asked."""

    model_type = "none"
    max_positions = 0
    window_size = None
    dtype = torch.float32
    device = torch.device("cpu")
    weight_bytes = 1
    attention_backend = linear_backend = elementwise_backend = lora_backend = ""
    is_encoder = False
    generates = True
    graphs = None
    slots = None
    vocab_size = VOCAB_SIZE
    eos_token_ids: frozenset[int] = frozenset()

    def __init__(self, num_rows: int) -> None:
        self.asked_at: list[float] = []
        generator = torch.Generator().manual_seed(1)
        # The warm-up asks for those of a prompt, too.
        self._logits = 9 * torch.randn(num_rows + 256, VOCAB_SIZE, generator=generator)
        self._logits[:, :NUM_SPECIAL] = -100.0

    def block_bytes(self, block_size: int) -> int:
        """Return the bytes of a block that holds nothing."""
        return block_size

    def allocate_cache(self, num_blocks: int, block_size: int) -> None:
        """Make nothing."""

    def free_cache(self) -> None:
        """Give nothing back."""

    def allocate_swap_space(self, num_blocks: int) -> float:
        """Make none."""
        return 0.0

    def make_metadata(self, *parts: Any) -> StepMetadata:
        """Return what a step is told."""
        return StepMetadata(*parts, None, None)

    def forward(
        self, _ids: Any, _positions: Any, _metadata: Any, logit_rows: torch.Tensor, *_slots: Any
    ) -> torch.Tensor:
        """Return logits that lie there."""
        self.asked_at.append(time.perf_counter())
        return self._logits[: len(logit_rows)]


def make_engine(num_rows: int, num_steps: int) -> Engine:
    """Return an engine with room for rows that decode for so many steps."""
    num_blocks = num_rows * (-(-(NUM_PROMPT + num_steps) // BLOCK_SIZE) + 1)
    tokenizer = Tokenizer.from_file(str(default_model_dir() / "tokenizer.json"))
    pool = PoolSettings(block_size=BLOCK_SIZE, memory_fraction=0.5, num_blocks=num_blocks)
    engine = Engine(NoModel(num_rows), tokenizer, pool)
    engine.warm_up(
        WarmupSpec(max_input_length=64, max_total_tokens=128, max_step_tokens=NUM_PROMPT * num_rows,
                   max_rows=num_rows)
    )  # fmt: skip
    return engine


def plans(num_rows: int, num_steps: int, sampling: SamplingParams) -> Iterator[StepPlan]:
    """Yield a step with all prompts, then decodes."""
    ids = [RequestId(number + 1) for number in range(num_rows)]
    blocks = itertools.count()
    length = 0
    for seq in range(1, num_steps + 1):
        count = NUM_PROMPT if seq == 1 else 1
        plan = StepPlan(seq, list(ids), [count] * num_rows)
        new = -(-(length + count) // BLOCK_SIZE) - -(-length // BLOCK_SIZE)
        length += count
        plan.num_new_blocks = [new] * num_rows
        plan.new_blocks = [BlockId(next(blocks)) for _ in range(new * num_rows)]
        if seq == 1:
            plan.new_rows = [_new_row(request_id, num_steps, sampling) for request_id in ids]
        yield plan


def _new_row(request_id: RequestId, num_steps: int, sampling: SamplingParams) -> NewRow:
    prompt = [
        NUM_SPECIAL + (17 * request_id + 31 * place) % (VOCAB_SIZE - NUM_SPECIAL)
        for place in range(NUM_PROMPT)
    ]
    stopping = StoppingParams(max_new_tokens=num_steps + 10, ignore_eos=True)
    spec = RequestSpec(
        request_id=request_id, prompt_ids=prompt, sampling=sampling, stopping=stopping
    )
    return NewRow(spec, ())


async def _run(engine: Engine, steps: Iterator[StepPlan], depth: int) -> None:
    queue = CommandQueue(1)
    sent: deque[asyncio.Future[Any]] = deque()
    for plan in steps:
        call = queue.run(
            lambda plan=plan: engine.launch(plan), finish=engine.collect, epoch=1, seq=plan.seq
        )
        sent.append(asyncio.ensure_future(call))
        await asyncio.sleep(0)
        if len(sent) == depth:
            await sent.popleft()
    for each in sent:
        await each
    await queue.close(10.0)


def between_launches(num_rows: int, num_steps: int, sampling: SamplingParams, depth: int) -> float:
    """Return the median milliseconds from one forward pass to the next."""
    engine = make_engine(num_rows, num_steps)
    steps = list(plans(num_rows, num_steps, sampling))
    model: Any = engine.model
    model.asked_at.clear()
    asyncio.run(_run(engine, iter(steps), depth))
    return 1e3 * statistics.median(
        after - before for before, after in itertools.pairwise(model.asked_at[2:])
    )


def alone(num_rows: int, num_steps: int, sampling: SamplingParams) -> tuple[float, float]:
    """Return the median milliseconds of a launch and of a collection, each by itself."""
    engine = make_engine(num_rows, num_steps)
    launches, collections = [], []
    for plan in plans(num_rows, num_steps, sampling):
        start = time.perf_counter()
        launched = engine.launch(plan)
        middle = time.perf_counter()
        engine.collect(launched)
        launches.append(middle - start)
        collections.append(time.perf_counter() - middle)
    return 1e3 * statistics.median(launches[2:]), 1e3 * statistics.median(collections[2:])


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="*", default=[32, 256])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--depth", type=int, default=2)
    options = parser.parse_args()
    print(
        "| rows | sampling | between launches, ms | launch alone | collect alone |\n|---|---|---|---|---|"
    )
    for num_rows in options.rows:
        found: dict[str, list[tuple[float, ...]]] = {kind: [] for kind in KINDS}
        for _ in range(options.rounds):
            for kind, sampling in KINDS.items():
                between = between_launches(num_rows, options.steps, sampling, options.depth)
                found[kind].append((between, *alone(num_rows, options.steps, sampling)))
        for kind, figures in found.items():
            columns = (statistics.median(column) for column in zip(*figures, strict=True))
            least = min(figures)[0]
            between, launch, collect = columns
            print(
                f"| {num_rows} | {kind} | {between:.2f} (best {least:.2f}) | {launch:.2f} | {collect:.2f} |"
            )


if __name__ == "__main__":
    main()
