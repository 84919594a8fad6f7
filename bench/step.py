"""Where a decode step's time goes, by row count, on the embedded default model.

For each row count: the whole step through the engine, and its parts measured apart in the
same run: the linears alone (with the head), the forward pass, and what the engine adds
around it (inputs, sampling, texts). ``floor`` is the larger of the weights' bytes over the
measured bandwidth and the linears; ``step/floor`` is what remains to be gained.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tests.helpers.default_model import default_model_dir

from lorax_contract.config import ShardConfig
from lorax_contract.step import (
    NewRow,
    RequestId,
    RequestSpec,
    SamplingParams,
    StepPlan,
    StoppingParams,
    WarmupSpec,
)
from lorax_shard.engine.engine import Engine
from lorax_shard.engine.memory import PoolSettings
from lorax_shard.model.loader import load_paged_model

ROWS = (1, 8, 32, 64)
CONTEXT = 100


def make_engine(model_dir: Path, attention: str, linear: str) -> Engine:
    """Load the model as a shard does."""
    from tokenizers import Tokenizer

    config = ShardConfig(
        model_dir=str(model_dir), model_id="bench", shard_uris=["unix:/unused"],
        attention_backend=attention, linear_backend=linear,
    )  # fmt: skip
    model = load_paged_model(config)
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    engine = Engine(
        model, tokenizer, PoolSettings(block_size=16, memory_fraction=0.5, num_blocks=4096)
    )
    engine.warm_up(
        WarmupSpec(max_input_length=256, max_total_tokens=512, max_step_tokens=256, max_rows=64)
    )
    return engine


def _spread(request_id: int) -> list[int]:
    """Return a prompt of tokens that are no text."""
    return [(17 * request_id + 31 * p) % 40_000 + 100 for p in range(CONTEXT)]


class Batch:
    """N rows that decode for ever; prompts are pieces of a text, if one is given."""

    def __init__(self, engine: Engine, num_rows: int, text: list[int] | None = None) -> None:
        engine.clear()
        self.engine = engine
        self.ids = [RequestId(index + 1) for index in range(num_rows)]
        self.length = CONTEXT
        self.next_block = 0
        plan = StepPlan(1, self.ids, [CONTEXT] * num_rows)
        plan.num_new_blocks = [-(-CONTEXT // 16)] * num_rows
        plan.new_blocks = self.take(sum(plan.num_new_blocks))
        for request_id in self.ids:
            at = 37 * request_id
            spec = RequestSpec(
                request_id=request_id,
                prompt_ids=_spread(request_id) if text is None else text[at : at + CONTEXT],
                sampling=SamplingParams(),
                stopping=StoppingParams(max_new_tokens=4000, ignore_eos=True),
            )
            plan.new_rows.append(NewRow(spec, ()))
        engine.step(plan)

    def take(self, num: int) -> list[Any]:
        """Return blocks never given out before in this batch."""
        self.next_block += num
        return list(range(self.next_block - num, self.next_block))

    def decode(self) -> int:
        """Run one decode step; returns the nanoseconds of its forward pass."""
        num = len(self.ids)
        plan = StepPlan(1, self.ids, [1] * num)
        new = int(self.length % 16 == 0)
        plan.num_new_blocks = [new] * num
        plan.new_blocks = self.take(new * num)
        self.length += 1
        return self.engine.step(plan).forward_ns


def timed_linears(engine: Engine, num_rows: int) -> Callable[[], None]:
    """Return a call that runs every linear of a step once, the head included."""
    from lorax_shard.linear import PackedLinear

    model: Any = engine.model
    modules = [
        module for module in model._model.modules()
        if isinstance(module, PackedLinear | torch.nn.Linear)
    ]  # fmt: skip
    inputs = {m.in_features: torch.randn(1, num_rows, m.in_features) for m in modules}

    def run() -> None:
        with torch.inference_mode():
            for module in modules:
                module(inputs[module.in_features])

    return run


def bandwidth() -> float:
    """Return bytes per second of reading memory."""
    data = torch.ones(1 << 26)
    best = min(measure(data.sum, 5))
    return data.numel() * 4 / best


def measure(call: Callable[[], Any], times: int) -> list[float]:
    """Return the seconds of each call after one to warm up."""
    call()
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return seconds


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--linear", default="auto")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    engine = make_engine(default_model_dir(), arguments.attention, arguments.linear)
    memory_ms = engine.model.weight_bytes / bandwidth() * 1e3
    rows = []
    print(f"attention {engine.model.attention_backend}, linears {engine.model.linear_backend}")
    print("| rows | step ms | forward ms | linears ms | weights ms | step/floor |")
    print("| --- | --- | --- | --- | --- | --- |")
    for num_rows in ROWS:
        batch = Batch(engine, num_rows)
        forward: list[float] = []
        step_s = measure(lambda batch=batch, f=forward: f.append(batch.decode()), arguments.steps)
        linears_s = measure(timed_linears(engine, num_rows), arguments.steps)
        step_ms, linears_ms = (statistics.median(s) * 1e3 for s in (step_s, linears_s))
        forward_ms = statistics.median(forward) / 1e6
        ratio = step_ms / max(memory_ms, linears_ms)
        rows.append([num_rows, step_ms, forward_ms, linears_ms, memory_ms, ratio])
        print("| " + " | ".join(f"{value:.4g}" for value in rows[-1]) + " |", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows) + "\n")


if __name__ == "__main__":
    main()
