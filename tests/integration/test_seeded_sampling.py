"""Seeded requests get the same tokens and logprobs, bit for bit, whoever runs beside them.

On batch-invariant models: a tiny Llama whose tokens are computed one at a time, driven
by the real scheduler, and FakeShard behind the real engine loop. Each request runs
alone, among 32, and among 32 in a pool so small that rows are preempted.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

import pytest
from tests.helpers.drive_engine import Answer, serve
from tests.helpers.tiny_models import VOCAB_SIZE, make_tiny_model
from tests.helpers.toy_paged_model import new_row
from tokenizers import Tokenizer

from lorax_contract.config import ShardConfig
from lorax_contract.step import FinishCode, LogitBias, RequestId, RequestSpec, WarmupSpec
from lorax_router.core.scheduler import Scheduler
from lorax_router.service.engine.loop import EngineLoop
from lorax_router.shards.fake.shard import FakeShard, expected_tokens
from lorax_shard.engine.engine import Engine
from lorax_shard.engine.memory import PoolSettings
from lorax_shard.model.loader import load_paged_model

NUM_REQUESTS = 32
BLOCK_SIZE = 4
AMPLE_BLOCKS, FEW_BLOCKS = 500, 24
# Every option of the sampler, alone or together.
SAMPLERS: list[dict[str, object]] = [
    {},
    {"temperature": 0.6},
    {"top_k": 12},
    {"top_p": 0.8},
    {"typical_p": 0.7},
    {"min_p": 0.05},
    {"repetition_penalty": 1.3, "num_alternatives": 3},
    {"frequency_penalty": 0.6, "presence_penalty": -0.4, "prompt_logprobs": True},
    {"logit_bias": LogitBias((3, 9, 40), (2.5, -100.0, 1.0)), "watermark": True},
    {"min_new_tokens": 9, "raw_logprobs": True, "temperature": 1.2, "num_alternatives": 2},
    {
        "temperature": 1.4, "top_k": 60, "top_p": 0.95, "typical_p": 0.95, "min_p": 0.01,
        "repetition_penalty": 1.1, "frequency_penalty": 0.2, "presence_penalty": 0.3,
        "num_alternatives": 5, "prompt_logprobs": True,
    },
]  # fmt: skip


def make_requests() -> list[RequestSpec]:
    rng = random.Random(32)
    return [
        new_row(
            number + 1,
            [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 21))],
            max_new_tokens=rng.randint(14, 24),
            ignore_eos=True,
            do_sample=True,
            seed=rng.getrandbits(64),
            **SAMPLERS[number % len(SAMPLERS)],
        ).spec
        for number in range(NUM_REQUESTS)
    ]


def make_scheduler(*, num_blocks: int, depth: int) -> Scheduler:
    return Scheduler(
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        max_step_tokens=40,
        max_rows=NUM_REQUESTS,
        depth=depth,
    )


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """A tiny Llama that computes each token in a forward pass of its own."""
    path = make_tiny_model("llama", tmp_path_factory.mktemp("llama"))
    model = load_paged_model(
        ShardConfig(model_dir=str(path), model_id="tiny", shard_uris=["unix:///unused"])
    )
    pool = PoolSettings(block_size=BLOCK_SIZE, memory_fraction=0.5, num_blocks=AMPLE_BLOCKS)
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    engine = Engine(model, tokenizer, pool, batch_invariant=True)
    engine.warm_up(
        WarmupSpec(max_input_length=32, max_total_tokens=48, max_step_tokens=40, max_rows=32)
    )
    return engine


@pytest.fixture(scope="module")
def llama_alone(engine: Engine) -> dict[RequestId, Answer]:
    """What each request is given when nothing else runs."""
    answers: dict[RequestId, Answer] = {}
    for spec in make_requests():
        scheduler = make_scheduler(num_blocks=AMPLE_BLOCKS, depth=1)
        answers |= serve(engine, scheduler, [spec])
    return answers


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("num_blocks", [AMPLE_BLOCKS, FEW_BLOCKS])
def test_a_tiny_llama_draws_the_same_alone_in_a_batch_and_across_preemptions(
    engine: Engine, llama_alone: dict[RequestId, Answer], num_blocks: int, depth: int
) -> None:
    scheduler = make_scheduler(num_blocks=num_blocks, depth=depth)
    answers = serve(engine, scheduler, make_requests(), at_once=True)
    preemptions = scheduler.stats().num_preemptions
    assert (preemptions > 0) == (num_blocks == FEW_BLOCKS)
    assert {answer.finish for answer in answers.values()} == {FinishCode.LENGTH}
    for request_id, answer in answers.items():
        assert answer.bits() == llama_alone[request_id].bits()
    drawn = [tuple(answer.tokens.ids) for answer in answers.values()]
    assert len(set(drawn)) == NUM_REQUESTS
    _tell("tiny Llama", sum(map(len, drawn)), preemptions, depth)


async def _serve_by_loop(
    requests: Sequence[RequestSpec], *, num_blocks: int, depth: int
) -> tuple[dict[RequestId, tuple[list[int], list[float]]], int]:
    """Return ids and logprobs of each request, and the preemptions."""
    shard = FakeShard(num_blocks=num_blocks, block_size=BLOCK_SIZE, max_depth=depth)
    await shard.warmup(
        WarmupSpec(max_input_length=32, max_total_tokens=48, max_step_tokens=40, max_rows=32)
    )
    scheduler = make_scheduler(num_blocks=num_blocks, depth=depth)
    loop = EngineLoop(shard, scheduler)
    running = asyncio.create_task(loop.run())

    async def read(spec: RequestSpec) -> tuple[list[int], list[float]]:
        ids: list[int] = []
        logprobs: list[float] = []
        async for chunk in loop.submit(spec):
            assert chunk.error is None
            ids += chunk.tokens.ids
            logprobs += chunk.tokens.logprobs
        return ids, logprobs

    try:
        answers = await asyncio.gather(*map(read, requests))
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await shard.close()
    assert not shard.violations
    by_id = {spec.request_id: each for spec, each in zip(requests, answers, strict=True)}
    return by_id, scheduler.stats().num_preemptions


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("num_blocks", [AMPLE_BLOCKS, FEW_BLOCKS])
def test_the_engine_loop_gives_the_same_alone_in_a_batch_and_across_preemptions(
    num_blocks: int, depth: int
) -> None:
    async def run() -> None:
        requests = make_requests()
        answers, preemptions = await _serve_by_loop(requests, num_blocks=num_blocks, depth=depth)
        assert (preemptions > 0) == (num_blocks == FEW_BLOCKS)
        for spec in requests:
            alone, _ = await _serve_by_loop([spec], num_blocks=AMPLE_BLOCKS, depth=1)
            assert answers[spec.request_id] == alone[spec.request_id]
            assert answers[spec.request_id][0] == expected_tokens(spec)
        num_tokens = sum(len(ids) for ids, _ in answers.values())
        _tell("FakeShard by the engine loop", num_tokens, preemptions, depth)

    asyncio.run(asyncio.wait_for(run(), 60))


def _tell(what: str, num_tokens: int, preemptions: int, depth: int) -> None:
    beside = f"with {preemptions} preemptions" if preemptions else "in a batch"
    print(
        f"\nFIGURE {what}, depth {depth}: {num_tokens} tokens and logprobs of {NUM_REQUESTS} "
        f"seeded requests {beside} equal those alone, bit for bit"
    )
