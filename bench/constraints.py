"""What binding outputs to schemas costs a step, on the embedded default model.

32 rows decode, by turns all free and 8 of them bound to schemas. Reported: the median step of
both, and each part by itself, best of 15, as a share of the median free step: the filling of 8
masks (the mean over the places of the outputs, and the slowest place), the whole advance (accept and
fill, which a step has beside its forward pass), and what is done in the step, the masking of the
logits. ``cpu_ratio`` compares what the process computed in a
median step, all threads, which others on the machine leave alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tests.helpers.default_model import default_model_dir
from tests.helpers.json_schemas import SCHEMAS
from tests.helpers.sampling import make_row
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
from lorax_shard.constraints.masks import masks_of
from lorax_shard.constraints.row import RowConstraint
from lorax_shard.constraints.rows import ConstrainedRows
from lorax_shard.constraints.setup import constraints_maker
from lorax_shard.engine.engine import Engine
from lorax_shard.engine.memory import PoolSettings
from lorax_shard.model.loader import load_paged_model
from lorax_shard.sampling.masks import NO_MASKS

ROWS, BOUND, CONTEXT, BLOCK_SIZE = 32, 8, 100, 16
BEST_OF = 15
# Outputs that are bound, as a schema and one item of them: of many, so that no row ends.
_DOCUMENTS: tuple[tuple[dict[str, Any], Any], ...] = (
    (
        SCHEMAS["nested"],
        {"person": {"name": "Ada", "home": {"city": "London", "zip": "12345"}}},
    ),
    (SCHEMAS["discriminated"], {"kind": "b", "y": "größer"}),
    ({"type": "string", "pattern": "^[a-z]+-[0-9]+$"}, "green-17"),
    (
        {
            "type": "object",
            "properties": {
                "id": {"type": "string", "format": "uuid"},
                "at": {"type": "string", "format": "date-time"},
                "share": {"type": "number", "minimum": 0, "maximum": 1},
                "note": {"type": "string", "maxLength": 200},
            },
            "required": ["id", "at", "share"],
        },
        {
            "id": "6f9619ff-8b86-4d01-b42d-00cf4fc964ff",
            "at": "2026-01-31T08:15:00Z",
            "share": 0.25,
            "note": "Some words, as people write them.",
        },
    ),
)
_NUM_ITEMS = 200
# Of each output that is followed.
_NUM_FOLLOWED = 60


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


class Bound(NamedTuple):
    """A row's grammar, and ids of a text that follows it."""

    constraint: Constraint
    ids: list[int]


def bound_rows(count: int, tokenizer: Tokenizer) -> list[Bound]:
    """Return as many grammars, each another one."""
    tokens = tokens_of(str(default_model_dir() / "tokenizer.json"))
    rows = []
    for number in range(count):
        schema, item = _DOCUMENTS[number % len(_DOCUMENTS)]
        document = {
            "title": f"schema {number}", "type": "array", "items": schema, "minItems": _NUM_ITEMS,
        }  # fmt: skip
        constraint = Constraint(kind=ConstraintKind.JSON_SCHEMA, text=json.dumps(document))
        text = json.dumps([item] * _NUM_ITEMS, ensure_ascii=False)
        grammar = Constraint(kind=ConstraintKind.LLGUIDANCE, text=compiled(constraint, tokens))
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        rows.append(Bound(grammar, ids[:_NUM_FOLLOWED]))
    return rows


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


def parts(engine: Engine, bound: list[Bound]) -> dict[str, float]:
    """Return what bound rows cost, each part by itself.

    The rows follow their outputs; a place in them is timed as often as BEST_OF says and the best
    counts. Given are the mean over the places and the slowest of them.
    """
    rows = engine.constraints
    assert isinstance(rows, ConstrainedRows)
    times = {"fill": _filled(rows, bound), "advance": _advanced(rows, bound)}
    members = [rows.enter(each.constraint) for each in bound]
    times["apply"] = [_added_by_masks(engine, members)]
    found = {f"{name}_8_s": statistics.mean(each) for name, each in times.items()}
    return found | {"fill_8_slowest_s": max(times["fill"])}


def _added_by_masks(engine: Engine, members: list[RowConstraint]) -> float:
    """Return by how much longer it takes to draw where some rows are masked."""
    sampler = engine.computation.sampler
    assert sampler is not None
    logits, rows = torch.randn(ROWS, engine.model.vocab_size), [make_row() for _ in range(ROWS)]
    masks, errors = masks_of(dict(enumerate(members)))
    assert not errors
    free, masked = (
        min(_seconds(lambda few=few: sampler.sample(logits, rows, few)) for _ in range(BEST_OF))
        for few in (NO_MASKS, masks)
    )
    return masked - free


def _filled(rows: ConstrainedRows, bound: list[Bound]) -> list[float]:
    """Return the times of filling 8 masks, by place; the tokens were accepted before."""

    def fill(members: list[RowConstraint]) -> None:
        for member in members:
            member.fill()

    def follow(members: list[RowConstraint], ids: Sequence[int]) -> float:
        for member, token_id in zip(members, ids, strict=True):
            member.accept(token_id)
        return _seconds(lambda: fill(members))

    return _best(rows, bound, follow)


def _advanced(rows: ConstrainedRows, bound: list[Bound]) -> list[float]:
    """Return the times of all that a step has beside its forward pass, by place."""

    def follow(members: list[RowConstraint], ids: Sequence[int]) -> float:
        def advance() -> None:
            rows.advance(members, lambda: ids)
            for member in members:
                member.mask()

        return _seconds(advance)

    return _best(rows, bound, follow)


def _best(
    rows: ConstrainedRows,
    bound: list[Bound],
    follow: Callable[[list[RowConstraint], Sequence[int]], float],
) -> list[float]:
    times = []
    for _ in range(BEST_OF):
        members = [rows.enter(each.constraint) for each in bound]
        for member in members:
            member.mask()
        places = zip(*(each.ids for each in bound), strict=True)
        times.append([follow(members, ids) for ids in places])
    return [min(each) for each in zip(*times, strict=True)]


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10, help="steps of each turn")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    engine = make_engine(default_model_dir())
    bound = bound_rows(BOUND, engine.tokenizer)
    grammars = [each.constraint for each in bound]
    for each in grammars:
        assert engine.constraints is not None
        engine.constraints.prepare(each)
    free_times, mixed_times = StepTimes([], []), StepTimes([], [])
    for _ in range(options.turns):
        add_steps(free_times, engine, [], options.steps)
        add_steps(mixed_times, engine, grammars, options.steps)
    free, mixed = statistics.median(free_times.wall), statistics.median(mixed_times.wall)
    result = {"step_s": free, "step_with_8_bound_s": mixed, **parts(engine, bound)}
    for part in ("fill_8", "fill_8_slowest", "advance_8", "apply_8"):
        result[f"{part}_share"] = result[f"{part}_s"] / free
    result["step_ratio"] = mixed / free
    result["cpu_ratio"] = statistics.median(mixed_times.cpu) / statistics.median(free_times.cpu)
    for name, value in result.items():
        print(f"{name:22} {value:.6f}" if name.endswith("_s") else f"{name:22} {value:.3f}")
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
