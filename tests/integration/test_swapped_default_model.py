"""The embedded model under memory pressure: rows that were swapped out and came back."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.acceptance.reference import Reference, Served
from tests.helpers.default_model import default_model_dir
from tests.helpers.drive_engine import serve
from tests.helpers.swap_world import FixedCost
from tests.helpers.toy_paged_model import new_row
from tokenizers import Tokenizer

from lorax_contract.config import ShardConfig
from lorax_contract.step import FinishCode, WarmupSpec
from lorax_router.core.scheduler import Scheduler
from lorax_shard.engine.engine import Engine
from lorax_shard.engine.memory import PoolSettings
from lorax_shard.model.loader import load_paged_model

BLOCK_SIZE, NUM_BLOCKS = 4, 16
TEXTS = [
    "The capital of France is", "def add(a, b):\n    return", "Once upon a time there was a",
    "Water boils at", "SELECT name FROM users WHERE", "The three primary colours are",
    "In the beginning the", "Dear Sir or Madam,", "1, 1, 2, 3, 5, 8,", "My favourite food is",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [float("inf"), 0.0], ids=["swap", "recompute"])
def test_a_pool_of_a_fifth_of_the_demand_gives_the_reference_s_tokens(seconds: float) -> None:
    path: Path = default_model_dir()
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    config = ShardConfig(model_dir=str(path), model_id="default", shard_uris=["unix:///unused"])
    model = load_paged_model(config)
    pool = PoolSettings(
        block_size=BLOCK_SIZE, memory_fraction=0.5, num_blocks=NUM_BLOCKS,
        swap_bytes=100 * model.block_bytes(BLOCK_SIZE),
    )  # fmt: skip
    engine = Engine(model, tokenizer, pool)
    engine.warm_up(
        WarmupSpec(max_input_length=24, max_total_tokens=60, max_step_tokens=32, max_rows=8)
    )
    assert engine.num_host_blocks == 100 and engine.block_move_s > 0
    scheduler = Scheduler(
        num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, max_step_tokens=32, max_rows=8, depth=2,
        num_host_blocks=engine.num_host_blocks, recompute=FixedCost(seconds), keep_evicted=False,
    )  # fmt: skip
    specs = [
        new_row(number, tokenizer.encode(text).ids, max_new_tokens=26, ignore_eos=True).spec
        for number, text in enumerate(TEXTS, 1)
    ]
    needed = sum(-(-spec.num_kv_tokens // BLOCK_SIZE) for spec in specs)
    assert needed >= 5 * NUM_BLOCKS
    answers = serve(engine, scheduler, specs, at_once=True)
    stats = scheduler.stats()
    assert all(answer.finish is FinishCode.LENGTH for answer in answers.values())
    assert stats.num_preemptions > 0 and stats.host.num_held == 0
    assert (stats.host.num_swaps > 0) == (seconds > 0)
    served = [
        Served(
            list(spec.prompt_ids),
            answers[spec.request_id].tokens.ids,
            answers[spec.request_id].tokens.logprobs,
        )
        for spec in specs
    ]
    verdict = Reference(path).check_greedy(served)
    print(f"FIGURE {stats.num_preemptions} gave way, {stats.host.num_swaps} swapped; {verdict}")
    assert verdict.ok
