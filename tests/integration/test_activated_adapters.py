"""Adapters that act from their invocation on (aLoRA): scheduler and engine against PEFT itself.

All requests are in one running batch, beside ordinary adapters and the base model, in chunks of
random sizes that begin and end anywhere; what an adapter computes is compared token by token.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers.drive_engine import Answer, serve
from tests.helpers.paged_runner import RELATIVE_TOLERANCE
from tests.helpers.peft_folders import load_adapter, load_model, save_adapter
from tests.helpers.rank_models import read_parts
from tests.helpers.stored_adapters import put_adapter
from tests.helpers.thread_ranks import ThreadGroup, run_ranks
from tests.helpers.tiny_models import VOCAB_SIZE, make_tiny_model
from tokenizers import Tokenizer

from lorax_contract.activation import NEVER, activation_start
from lorax_contract.adapters import AdapterContent
from lorax_contract.config import ShardConfig
from lorax_contract.constraint import Constraint, ConstraintKind
from lorax_contract.step import (
    AdapterHandle,
    RequestId,
    RequestSpec,
    SamplingParams,
    StepOutcome,
    StepPlan,
    StoppingParams,
    WarmupSpec,
)
from lorax_router.core.adapters.table import AdapterTable
from lorax_router.core.scheduler import Scheduler
from lorax_shard.adapters.host_cache import HostCache
from lorax_shard.adapters.prepare_lane import PrepareLane
from lorax_shard.constraints.setup import constraints_maker
from lorax_shard.engine.engine import Engine
from lorax_shard.engine.launched import LaunchedStep
from lorax_shard.engine.memory import PoolSettings
from lorax_shard.model.hf_model import HFPagedModel
from lorax_shard.model.loader import load_paged_model
from lorax_shard.model.rank_model import meet
from lorax_shard.peft.base import BaseDescription
from lorax_shard.store.store import AdapterStore

NUM_BLOCKS, BLOCK_SIZE = 60, 4
_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# By handle: what invokes it, and the rest of its options; the last one acts on every token.
ADAPTERS: list[tuple[list[int], dict[str, Any]]] = [
    ([41, 42, 43], {"target_modules": _LINEARS, "r": 8, "lora_alpha": 16}),
    ([41, 42], {"target_modules": ["q_proj", "v_proj"], "r": 3, "lora_bias": True}),
    ([7], {"target_modules": [*_LINEARS, "lm_head"], "r": 4, "use_rslora": True}),
    ([], {"target_modules": _LINEARS, "r": 5}),
]


@dataclass(frozen=True)
class Asked:
    """A request: with which adapter (0: the base), and where its adapter begins to act."""

    handle: int
    ids: list[int]
    start: int


def _requests() -> list[Asked]:
    """Return prompts that have an invocation anywhere, twice, in part, or not at all."""
    draw = random.Random(5)
    made = []
    for handle, (invocation, _) in enumerate([([], {}), *ADAPTERS]):
        shapes = [[19, 3], [0, 6], [12, 9, 4], [17, 0], [11]] if invocation else [[14], [9]]
        for lengths in shapes:
            ids = _plain(draw, lengths[0])
            for length in lengths[1:]:
                ids += [*invocation, *_plain(draw, length)]
            if len(lengths) == 1 and len(invocation) > 1:
                # All but the last token of what would invoke it.
                ids += invocation[:-1]
            made.append(Asked(handle, ids, activation_start(ids, invocation)))
    # A prompt that many begin with, each with its own end.
    shared = _plain(draw, 30)
    for handle, (invocation, _) in enumerate([([], {}), *ADAPTERS]):
        ids = [*shared, *invocation, *_plain(draw, 3)]
        made.append(Asked(handle, ids, activation_start(ids, invocation)))
    draw.shuffle(made)
    return made


def _plain(draw: random.Random, num: int) -> list[int]:
    return [draw.randrange(50, VOCAB_SIZE) for _ in range(num)]


REQUESTS = _requests()


class World:
    """A tiny model with adapters that PEFT made, and PEFT's own model of each."""

    def __init__(self, root: Path) -> None:
        self.path = make_tiny_model("llama", root / "model")
        self.tokenizer = Tokenizer.from_file(str(self.path / "tokenizer.json"))
        self.config = ShardConfig(
            model_dir=str(self.path), model_id="tiny", shard_uris=["unix:///unused"],
            adapters=True, adapter_store_dir=str(root / "store"),
        )  # fmt: skip
        self.folders = [
            save_adapter(
                self.path, root / f"saved-{number}", seed=number,
                alora_invocation_tokens=invocation or None, **options,
            )
            for number, (invocation, options) in enumerate(ADAPTERS)
        ]  # fmt: skip
        self.peft = [load_model(self.path), *(load_adapter(self.path, f) for f in self.folders)]
        self.store = AdapterStore(root / "store", max_bytes=1 << 30)

    def engine(
        self, paged: HFPagedModel, base: BaseDescription, group: ThreadGroup | None = None
    ) -> Engine:
        """Return a warm engine on whose lane all adapters lie."""
        assert paged.lora is not None
        lane = PrepareLane(
            HostCache(self.store, host_bytes=1 << 30), paged.lora, dtype=torch.float32
        )
        for handle, folder in enumerate(self.folders, start=1):
            content = AdapterContent(parts=(put_adapter(self.store, folder, base),))
            lane.prepare(AdapterHandle(handle), content)
        pool = PoolSettings(block_size=BLOCK_SIZE, memory_fraction=0.5, num_blocks=NUM_BLOCKS)
        engine = Engine(
            paged, self.tokenizer, pool, adapters=lane, group=group,
            make_constraints=constraints_maker(self.tokenizer, VOCAB_SIZE, paged.eos_token_ids),
        )  # fmt: skip
        spec = WarmupSpec(max_input_length=64, max_total_tokens=96, max_step_tokens=64, max_rows=8)
        engine.warm_up(spec)
        return engine

    @torch.no_grad()
    def logprobs(self, asked: Asked, output: Sequence[int]) -> torch.Tensor:
        """Return PEFT's log-probabilities after each token of a prompt and its output.

        PEFT looks for the invocation in the prompt alone, when it generates; here it is told
        where that was found, and the output is computed with the prompt.
        """
        ids = [*asked.ids, *output]
        logits = self._forward(asked, ids).logits[0]
        return logits.float().log_softmax(dim=-1)

    @torch.no_grad()
    def hidden(self, asked: Asked) -> torch.Tensor:
        """Return what the last layer of PEFT's model gives for each token of a prompt."""
        states = self._forward(asked, asked.ids, output_hidden_states=True).hidden_states[-1]
        return states[0].float()

    def _forward(self, asked: Asked, ids: Sequence[int], **named: Any) -> Any:
        if asked.handle and ADAPTERS[asked.handle - 1][0]:
            offset = None if asked.start == NEVER else len(ids) - asked.start
            named["alora_offsets"] = [offset]
        return self.peft[asked.handle](input_ids=torch.tensor([ids]), **named)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("activated"))


class RandomSteps(Scheduler):
    """Ends chunks anywhere: each step has another budget."""

    def __init__(self, seed: int, **options: Any) -> None:
        super().__init__(max_step_tokens=64, **options)
        self._draw = random.Random(seed)

    def plan(self, now: float) -> StepPlan | None:
        self.max_step_tokens = self._draw.choice([8, 9, 11, 13, 18, 37])
        return super().plan(now)


def scheduler(seed: int, num_blocks: int = NUM_BLOCKS) -> Scheduler:
    """Return a scheduler that knows all adapters, three of which fit at once."""
    table = AdapterTable(max_resident=3)
    for handle in range(1, len(ADAPTERS) + 1):
        table.add(AdapterHandle(handle), 1)
    return RandomSteps(
        seed, num_blocks=num_blocks, block_size=BLOCK_SIZE, max_rows=8, depth=2, adapters=table
    )


def specs(*, with_starts: bool = True, **sampling: Any) -> list[RequestSpec]:
    """Return all requests, as a router sends them that knows where adapters begin to act."""
    return [
        RequestSpec(
            request_id=RequestId(number), prompt_ids=asked.ids, sampling=SamplingParams(**sampling),
            stopping=StoppingParams(max_new_tokens=6, ignore_eos=True),
            adapter=AdapterHandle(asked.handle), adapter_start=asked.start if with_starts else None,
        )
        for number, asked in enumerate(REQUESTS, start=1)
    ]  # fmt: skip


def compare(world: World, answers: dict[RequestId, Answer]) -> float:
    """Fail unless each token and its logprob are PEFT's; return the largest difference."""
    worst = 0.0
    for number, answer in answers.items():
        asked = REQUESTS[number - 1]
        assert answer.error is None
        output = answer.tokens.ids
        assert len(output) == 6
        expected = world.logprobs(asked, output)
        num = len(asked.ids)
        scale = float(expected.abs().max())
        got = torch.tensor(answer.tokens.logprobs)
        chosen = expected[num - 1 : -1].gather(1, torch.tensor(output)[:, None])[:, 0]
        differences = [float((got - chosen).abs().max())]
        best = expected[num - 1 : -1].max(dim=1).values
        differences.append(float((best - chosen).max()))
        if answer.prompt_tokens is not None:
            told = torch.tensor(answer.prompt_tokens.logprobs[1:])
            wanted = expected[: num - 1].gather(1, torch.tensor(asked.ids[1:])[:, None])[:, 0]
            differences.append(float((told - wanted).abs().max()))
        assert max(differences) <= RELATIVE_TOLERANCE * scale, (asked, differences)
        worst = max(worst, max(differences) / scale)
    return worst


def test_each_adapter_shows_where_it_acts_and_there_only(world: World) -> None:
    for asked in REQUESTS:
        ours = world.logprobs(asked, [])
        base = world.logprobs(Asked(0, asked.ids, 0), [])
        differs = (ours - base).abs().max(dim=1).values > 1e-3
        start = asked.start if asked.handle else NEVER
        assert differs.tolist() == [place >= start for place in range(len(asked.ids))]


@pytest.mark.parametrize(
    "backend", ["cpp", "cpu", "torch", pytest.param("triton", marks=pytest.mark.slow)]
)
def test_a_mixed_batch_equals_peft(world: World, backend: str) -> None:
    """With blocks shared, chunks that end anywhere, and rows that give way."""
    paged = load_paged_model(replace(world.config, lora_backend=backend))
    assert paged.base is not None
    engine = world.engine(paged, paged.base)
    # Triton's interpreter takes its time.
    is_slow = backend == "triton"
    for seed in range(1 if is_slow else 3):
        core = scheduler(seed, num_blocks=60 if seed else 30)
        worst = compare(
            world, serve(engine, core, specs()[: 8 if is_slow else None], at_once=seed == 1)
        )
        stats = core.stats()
        assert is_slow or stats.num_cached_tokens > 20
        assert is_slow or seed or stats.num_preemptions > 0
        print(
            f"FIGURE {len(REQUESTS)} rows, difference {worst:.1e}, {stats.num_preemptions} gave way"
        )


def test_logprobs_of_prompts_are_those_of_both_parts(world: World) -> None:
    paged = load_paged_model(world.config)
    assert paged.base is not None
    engine = world.engine(paged, paged.base)
    asked = specs(prompt_logprobs=True, num_prompt_alternatives=2)
    compare(world, serve(engine, scheduler(4), asked))


def test_shards_find_the_invocation_where_nobody_tells_them(world: World) -> None:
    """As for clients of LoRAX's own messages, which have no word for it."""
    paged = load_paged_model(world.config)
    assert paged.base is not None
    engine = world.engine(paged, paged.base)
    compare(world, serve(engine, scheduler(5), specs(with_starts=False)))


def test_outputs_of_grammars_are_bound_and_drawn_from_what_the_adapter_says(world: World) -> None:
    paged = load_paged_model(world.config)
    assert paged.base is not None
    engine = world.engine(paged, paged.base)
    constraint = Constraint(kind=ConstraintKind.REGEX, text="[a-d]{4}")
    asked = [
        replace(spec, constraint=constraint, stopping=StoppingParams(max_new_tokens=6))
        for spec in specs()
    ]
    texts = [world.tokenizer.decode([number]) for number in range(VOCAB_SIZE)]
    for number, answer in serve(engine, scheduler(7), asked).items():
        assert re.fullmatch("[a-d]{4}", answer.text or "")
        request, output = REQUESTS[number - 1], answer.tokens.ids
        expected = world.logprobs(request, output)[len(request.ids) - 1 : -1]
        left = 4
        for logprobs, token, told in zip(expected, output, answer.tokens.logprobs, strict=True):
            if left:
                allowed = [
                    n for n, text in enumerate(texts) if re.fullmatch(f"[a-d]{{1,{left}}}", text)
                ]
                wanted = logprobs[token] - logprobs[allowed].logsumexp(dim=0)
                assert logprobs[token] >= logprobs[allowed].max() - 1e-3
                assert abs(told - float(wanted)) <= 1e-3
            left -= len(texts[token]) if left else 0


class Ranks:
    """Steps of two ranks at once, as one engine's."""

    def __init__(self, engines: list[Engine]) -> None:
        self._engines = engines
        self._threads = ThreadPoolExecutor(len(engines))

    def launch(self, plan: StepPlan) -> list[LaunchedStep]:
        launches = [self._threads.submit(each.launch, plan) for each in self._engines]
        return [each.result() for each in launches]

    def collect(self, steps: list[LaunchedStep]) -> StepOutcome:
        first, *_ = [each.collect(step) for each, step in zip(self._engines, steps, strict=True)]
        return first


def test_two_ranks_together_equal_peft(world: World) -> None:
    parts = read_parts(world.config, 2)

    def build(group: ThreadGroup) -> Engine:
        part = parts[group.rank]
        meet(part, group)
        assert part.paged.base is not None
        return world.engine(part.paged, part.paged.base, group)

    engine: Any = Ranks(run_ranks(2, build))
    compare(world, serve(engine, scheduler(6), specs()))
