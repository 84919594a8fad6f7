"""Vectors of prompts against transformers and PEFT, in one running batch with rows that generate.

Prompts share blocks, come in chunks that end anywhere, and give way to others.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tests.helpers.drive_engine import Answer, serve
from tests.helpers.paged_runner import RELATIVE_TOLERANCE
from tests.helpers.rank_models import read_parts
from tests.helpers.thread_ranks import ThreadGroup, run_ranks
from tests.helpers.tiny_models import make_tiny_model
from tests.helpers.toy_paged_model import pooled
from tests.integration.test_activated_adapters import (
    BLOCK_SIZE,
    NUM_BLOCKS,
    REQUESTS,
    Ranks,
    World,
    compare,
    scheduler,
    specs,
)
from tokenizers import Tokenizer

from lorax_contract.config import ShardConfig
from lorax_contract.pooling import Pooling
from lorax_contract.step import (
    BASE_ADAPTER,
    OutputKind,
    RequestSpec,
    StoppingParams,
    WarmupSpec,
)
from lorax_shard.engine.engine import Engine
from lorax_shard.engine.memory import PoolSettings
from lorax_shard.model.loader import load_paged_model
from lorax_shard.model.rank_model import meet


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("vectors"))


def asking_for_vectors(pooling: Pooling | None = None) -> list[RequestSpec]:
    """Return all requests: by turns for tokens, the last token's vector, the mean's."""
    kinds = (None, Pooling.LAST, Pooling.MEAN)
    return [
        spec if kind is None else as_vector(spec, kind)
        for place, spec in enumerate(specs())
        for kind in (kinds[place % 3] if pooling is None else pooling,)
    ]


def as_vector(spec: RequestSpec, pooling: Pooling) -> RequestSpec:
    stopping = StoppingParams(max_new_tokens=0)
    return replace(spec, output=OutputKind.VECTOR, pooling=pooling, stopping=stopping)


def assert_vector(answer: Answer, states: torch.Tensor, pooling: Pooling) -> None:
    assert answer.error is None
    assert answer.vector is not None
    assert not answer.tokens.ids
    found = torch.from_numpy(np.frombuffer(answer.vector, dtype="<f4").copy())
    expected = pooled(states, pooling)
    scale = float(expected.abs().max())
    assert float((found - expected).abs().max()) <= RELATIVE_TOLERANCE * scale
    assert float(torch.cosine_similarity(found, expected, dim=0)) >= 0.99999


def check(world: World, engine: Any, core: Any, asked: list[RequestSpec], **options: Any) -> None:
    answers = serve(engine, core, asked, **options)
    with_tokens = {}
    for spec in asked:
        answer = answers[spec.request_id]
        if spec.output is OutputKind.VECTOR:
            states = world.hidden(REQUESTS[spec.request_id - 1])
            assert_vector(answer, states, spec.pooling)
        else:
            with_tokens[spec.request_id] = answer
    compare(world, with_tokens)


@pytest.mark.parametrize("seed", range(3))
def test_vectors_and_tokens_of_a_mixed_batch_equal_peft(world: World, seed: int) -> None:
    paged = load_paged_model(world.config)
    assert paged.base is not None
    engine = world.engine(paged, paged.base)
    core = scheduler(seed, num_blocks=60 if seed else 12)
    check(world, engine, core, asking_for_vectors(), at_once=seed != 2)
    stats = core.stats()
    if seed:
        assert stats.num_cached_tokens > 10
    else:
        assert stats.num_preemptions > 0


def test_prompts_that_were_computed_before_are_computed_again_for_means_only(world: World) -> None:
    paged = load_paged_model(world.config)
    assert paged.base is not None
    engine = world.engine(paged, paged.base)
    for pooling, is_found in ((Pooling.LAST, True), (Pooling.MEAN, False)):
        core = scheduler(3)
        check(world, engine, core, asking_for_vectors(pooling), at_once=False)
        assert bool(core.stats().num_cached_tokens) == is_found


def test_two_ranks_together_equal_peft(world: World) -> None:
    parts = read_parts(world.config, 2)

    def build(group: ThreadGroup) -> Engine:
        part = parts[group.rank]
        meet(part, group)
        assert part.paged.base is not None
        return world.engine(part.paged, part.paged.base, group)

    check(world, Ranks(run_ranks(2, build)), scheduler(6), asking_for_vectors())


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "gpt2", "phi3"])
def test_each_family_gives_what_its_last_layer_gives(family: str, tmp_path: Path) -> None:
    path = make_tiny_model(family, tmp_path / family)
    stock = transformers.AutoModel.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    )
    paged = load_paged_model(
        ShardConfig(model_dir=str(path), model_id="tiny", shard_uris=["unix:///unused"])
    )
    pool = PoolSettings(block_size=BLOCK_SIZE, memory_fraction=0.5, num_blocks=NUM_BLOCKS)
    engine = Engine(paged, Tokenizer.from_file(str(path / "tokenizer.json")), pool)
    engine.warm_up(
        WarmupSpec(max_input_length=64, max_total_tokens=96, max_step_tokens=64, max_rows=8)
    )
    asked = [
        replace(as_vector(spec, pooling), adapter=BASE_ADAPTER, adapter_start=None)
        for spec, pooling in zip(specs(), list(Pooling) * len(REQUESTS), strict=False)
    ]
    answers = serve(engine, scheduler(2), asked)
    for spec in asked:
        with torch.no_grad():
            states = stock(torch.tensor([spec.prompt_ids])).last_hidden_state[0]
        assert_vector(answers[spec.request_id], states, spec.pooling)
