"""What binding outputs to schemas costs a step, on the embedded default model.

32 rows decode, by turns all free and 8 of them bound to schemas. Reported: the median step of
both, and each part by itself, best of 15, as a share of the median free step: the filling of 8
masks, the whole advance (accept and fill, which a step has beside its forward pass), and what is
done in the step, the masking of the logits. ``cpu_ratio`` compares what the process computed in a
median step, all threads, which others on the machine leave alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tests.helpers.default_model import default_model_dir
from tests.helpers.json_schemas import SCHEMAS
from tokenizers import Tokenizer

from lorax_contract.config import ShardConfig
from lorax_contract.constraint import Constraint, ConstraintKind
from lorax_contract.step import (
    NewRow,
    RequestId,
    RequestSpec,
    SamplingParams,
    StepPlan,
    StoppingParams,
    WarmupSpec,
)
from lorax_router.service.constraints.check_process import compiled, tokens_of
from lorax_shard.constraints.masks import masked
from lorax_shard.constraints.rows import ConstrainedRows
from lorax_shard.constraints.setup import constraints_maker
from lorax_shard.engine.engine import Engine
from lorax_shard.engine.memory import PoolSettings
from lorax_shard.model.loader import load_paged_model

ROWS, BOUND, CONTEXT, BLOCK_SIZE = 32, 8, 100, 16
BEST_OF = 15
# Long outputs, so that no bound row ends while steps are timed.
_LONG = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 2000},
        "tags": {"type": "array", "items": {"type": "string", "pattern": "^[a-z]+-[0-9]+$"}},
        "other": SCHEMAS["nested"],
    },
    "required": ["name", "tags", "other"],
}


def make_engine(model_dir: Path) -> Engine:
    """Load the model as a shard does."""
    config = ShardConfig(model_dir=str(model_dir), model_id="bench", shard_uris=["unix:/unused"])
    model = load_paged_model(config)
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    engine = Engine(
        model,
        tokenizer,
        PoolSettings(block_size=BLOCK_SIZE, memory_fraction=0.5, num_blocks=2048),
        make_constraints=constraints_maker(tokenizer, model.vocab_size, model.eos_token_ids),
    )
    engine.warm_up(
        WarmupSpec(max_input_length=256, max_total_tokens=512, max_step_tokens=256, max_rows=64)
    )
    return engine


def constraints(count: int) -> list[Constraint]:
    """Return as many grammars, each another one."""
    tokens = tokens_of(str(default_model_dir() / "tokenizer.json"))
    documents = [{**_LONG, "title": f"schema {number}"} for number in range(count)]
    return [
        Constraint(
            kind=ConstraintKind.LLGUIDANCE,
            text=compiled(
                Constraint(kind=ConstraintKind.JSON_SCHEMA, text=json.dumps(document)), tokens
            ),
        )
        for document in documents
    ]


class StepTimes(NamedTuple):
    """Seconds of decode steps."""

    wall: list[float]
    cpu: list[float]


def add_steps(times: StepTimes, engine: Engine, bound: list[Constraint], num_steps: int) -> None:
    """Time decode steps of 32 rows, the first of them bound."""
    engine.clear()
    blocks_each = -(-(CONTEXT + num_steps + 8) // BLOCK_SIZE)
    plan = StepPlan(1, [RequestId(i + 1) for i in range(ROWS)], [CONTEXT] * ROWS)
    plan.num_new_blocks = [blocks_each] * ROWS
    plan.new_blocks = list(range(1, blocks_each * ROWS + 1))  # type: ignore[arg-type]
    for index, request_id in enumerate(plan.row_ids):
        spec = RequestSpec(
            request_id=request_id,
            prompt_ids=[(17 * request_id + 31 * p) % 40_000 + 100 for p in range(CONTEXT)],
            sampling=SamplingParams(),
            stopping=StoppingParams(max_new_tokens=4000, ignore_eos=True),
            constraint=bound[index] if index < len(bound) else None,
        )
        plan.new_rows.append(NewRow(spec, ()))
    engine.step(plan)
    for seq in range(2, num_steps + 2):
        decode = StepPlan(seq, list(plan.row_ids), [1] * ROWS, [0] * ROWS)
        started, computed = time.perf_counter(), time.process_time()
        outcome = engine.step(decode)
        times.wall.append(time.perf_counter() - started)
        times.cpu.append(time.process_time() - computed)
        assert len(outcome.row_ids) == ROWS


def parts(engine: Engine, bound: list[Constraint]) -> dict[str, float]:
    """Return the best times of what bound rows cost, each part by itself."""
    rows = engine.constraints
    assert isinstance(rows, ConstrainedRows)
    fills, advances, applied = [], [], []
    members = [rows.enter(each) for each in bound]
    for member in members:
        member.mask()
    logits = torch.randn(ROWS, engine.model.vocab_size)
    for _ in range(BEST_OF):
        ids = [_first_allowed(member.mask()) for member in members]
        started = time.perf_counter()
        masked(logits, dict(enumerate(members)))
        applied.append(time.perf_counter() - started)
        started = time.perf_counter()
        rows.advance(members, ids)
        for member in members:
            member.mask()
        advances.append(time.perf_counter() - started)
        started = time.perf_counter()
        for member in members:
            member.fill()
        fills.append(time.perf_counter() - started)
    return {"fill_8_s": min(fills), "advance_8_s": min(advances), "apply_8_s": min(applied)}


def _first_allowed(mask: Any) -> int:
    return int(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10, help="steps of each turn")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    engine = make_engine(default_model_dir())
    bound = constraints(BOUND)
    for each in bound:
        assert engine.constraints is not None
        engine.constraints.prepare(each)
    free_times, mixed_times = StepTimes([], []), StepTimes([], [])
    for _ in range(options.turns):
        add_steps(free_times, engine, [], options.steps)
        add_steps(mixed_times, engine, bound, options.steps)
    free, mixed = statistics.median(free_times.wall), statistics.median(mixed_times.wall)
    result = {"step_s": free, "step_with_8_bound_s": mixed, **parts(engine, bound)}
    for part in ("fill", "advance", "apply"):
        result[f"{part}_share"] = result[f"{part}_8_s"] / free
    result["step_ratio"] = mixed / free
    result["cpu_ratio"] = statistics.median(mixed_times.cpu) / statistics.median(free_times.cpu)
    for name, value in result.items():
        print(f"{name:22} {value:.6f}" if name.endswith("_s") else f"{name:22} {value:.3f}")
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
