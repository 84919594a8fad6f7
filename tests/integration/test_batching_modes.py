"""The embedded model, really computed: greedy tokens are the same however steps are composed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.helpers.default_model import default_model_dir
from tests.helpers.drive_engine import serve
from tests.helpers.toy_paged_model import new_row
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from lorax_contract.config import BATCHINGS, ShardConfig
from lorax_contract.step import RequestSpec, WarmupSpec
from lorax_router.core.scheduler import Scheduler
from lorax_shard.engine.engine import Engine
from lorax_shard.engine.memory import PoolSettings
from lorax_shard.model.loader import load_paged_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

NUM_BLOCKS = 96
STEP_TOKENS = 24
# Two choices that are nearer than this may be taken either way: rounding depends on the batch.
TIE = 5e-4
TEXTS = [
    "The capital of France is Paris, and the capital of Italy is",
    "Water boils at",
    "One, two, three, four, five, six, seven, eight, nine, ten, eleven, twelve, thirteen, fourteen",
    "Dear Sir or Madam, I am writing to",
    "def fibonacci(n):",
    "Once upon a time there was a king who had three daughters, and the youngest",
]
LIMITS: list[dict[str, Any]] = [
    *({"batching": each, "max_waiting_tokens": 4} for each in BATCHINGS),
    {"max_kv_read": 60},
    # All chunks as small as can be.
    {"target_itl_s": 1e-6},
]


def served(engine: Engine, specs: list[RequestSpec], limits: dict[str, Any]) -> list[list[int]]:
    """Return the tokens of requests that come one after the other."""
    scheduler = Scheduler(
        num_blocks=NUM_BLOCKS, block_size=4, max_step_tokens=STEP_TOKENS, max_rows=8, depth=2,
        prefix_caching=False, **limits,
    )  # fmt: skip
    answers = serve(engine, scheduler, specs)
    return [answers[spec.request_id].tokens.ids for spec in specs]


def test_greedy_tokens_are_the_models_own_in_each_mode() -> None:
    path = default_model_dir()
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    config = ShardConfig(model_dir=str(path), model_id="default", shard_uris=["unix:///unused"])
    pool = PoolSettings(block_size=4, memory_fraction=0.5, num_blocks=NUM_BLOCKS)
    engine = Engine(load_paged_model(config), tokenizer, pool)
    engine.warm_up(
        WarmupSpec(
            max_input_length=64, max_total_tokens=96, max_step_tokens=STEP_TOKENS, max_rows=8
        )
    )
    stock = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    num_ties = num_tokens = 0
    for limits in LIMITS:
        specs = [
            new_row(number, tokenizer.encode(text).ids, max_new_tokens=16, ignore_eos=True).spec
            for number, text in enumerate(TEXTS, 1)
        ]
        for spec, ids in zip(specs, served(engine, specs, limits), strict=True):
            assert len(ids) == 16
            whole = torch.tensor([[*spec.prompt_ids, *ids]])
            with torch.inference_mode():
                logits = stock(whole).logits[0, len(spec.prompt_ids) - 1 : -1]
            chosen = logits.gather(1, torch.tensor(ids)[:, None])[:, 0]
            gaps = logits.max(dim=1).values - chosen
            assert gaps.max() <= TIE, (limits, spec.request_id)
            num_ties += int((gaps > 0).sum())
            num_tokens += len(ids)
    print(f"FIGURE {len(LIMITS)} ways, {num_tokens} tokens, {num_ties} of them ties")
