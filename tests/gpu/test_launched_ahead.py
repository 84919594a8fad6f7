"""Steps of a model on a GPU, launched ahead of the ids of the ones before: nothing waits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bench.launches import KINDS
from tests.helpers.tiny_models import make_tiny_model
from tests.helpers.toy_paged_model import make_plan
from tokenizers import Tokenizer

from lorax_contract.config import ShardConfig
from lorax_contract.step import (
    NewRow,
    RequestId,
    RequestSpec,
    StepOutcome,
    StepPlan,
    StoppingParams,
    WarmupSpec,
)
from lorax_shard.engine.engine import Engine
from lorax_shard.engine.memory import PoolSettings
from lorax_shard.model.loader import load_paged_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that torch can use"),
]

NUM_ROWS, NUM_PROMPT, NUM_STEPS = 5, 6, 12


def make_engine(folder: Path) -> Engine:
    config = ShardConfig(
        model_dir=str(folder), model_id="tiny", shard_uris=["unix:/unused"], device="cuda",
        dtype="float32",
    )  # fmt: skip
    pool = PoolSettings(block_size=config.block_size, memory_fraction=0.5, num_blocks=64)
    engine = Engine(
        load_paged_model(config), Tokenizer.from_file(str(folder / "tokenizer.json")), pool
    )
    engine.warm_up(
        WarmupSpec(max_input_length=32, max_total_tokens=64, max_step_tokens=64, max_rows=8)
    )
    return engine


def plans(kind: str) -> list[StepPlan]:
    """Return a step with all prompts, then decodes; blocks suffice for all."""
    stopping = StoppingParams(max_new_tokens=50, ignore_eos=True)
    rows = range(1, NUM_ROWS + 1)
    new = [
        NewRow(
            RequestSpec(
                request_id=RequestId(row), prompt_ids=[20 + 7 * row + p for p in range(NUM_PROMPT)],
                sampling=KINDS[kind], stopping=stopping,
            ),
            (),
        )
        for row in rows
    ]  # fmt: skip
    first = make_plan(1, [(row, NUM_PROMPT, [2 * row, 2 * row + 1]) for row in rows], new=new)
    return [first] + [
        make_plan(seq, [(row, 1, []) for row in rows]) for seq in range(2, NUM_STEPS + 1)
    ]


def ids_of(outcomes: list[StepOutcome]) -> list[list[int]]:
    return [outcome.tokens.ids for outcome in outcomes]


@pytest.mark.parametrize("kind", ["greedy", "top-p"])
def test_steps_launched_ahead_draw_the_same_and_wait_for_nothing(tmp_path: Path, kind: str) -> None:
    engine = make_engine(make_tiny_model("llama", tmp_path))
    expected = ids_of([engine.step(plan) for plan in plans(kind)])
    engine.clear()
    launched = [engine.launch(plan) for plan in plans(kind)[:2]]
    torch.cuda.set_sync_debug_mode("error")
    try:
        launched += [engine.launch(plan) for plan in plans(kind)[2:]]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert ids_of([engine.collect(each) for each in launched]) == expected
