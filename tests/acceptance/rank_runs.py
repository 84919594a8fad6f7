"""Ranks as processes, each with its own scheduler and engine, in lockstep over gloo.

The scheduler is deterministic: given the same requests and outcomes, the schedulers of all
ranks make the same plans. So no router is needed, and each rank can keep the logits from
which every token was drawn.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from safetensors import safe_open
from safetensors.torch import save_file
from tests.helpers.drive_engine import serve
from tests.helpers.peft_cases import FAMILIES as NAMED
from tests.helpers.peft_cases import LLAMA, Names, some
from tests.helpers.peft_folders import load_model, save_adapter
from tests.helpers.stored_adapters import put_adapter
from tests.helpers.tiny_models import VOCAB_SIZE, make_tiny_model
from tests.helpers.toy_adapters import using
from tests.helpers.toy_paged_model import new_row

from lorax_contract.adapters import AdapterContent, AdapterPart
from lorax_contract.config import ShardConfig
from lorax_contract.step import AdapterHandle, RequestSpec, StepOutcome, StepPlan, WarmupSpec
from lorax_router.core.adapters.table import AdapterTable
from lorax_router.core.scheduler import Scheduler

FAMILIES = ("llama", "qwen2", "qwen3_moe", "gemma2", "gpt2", "mixtral")
WORLD_SIZES = (1, 2, 3, 4)
NUM_ADAPTERS, NUM_SLOTS, REQUESTS_EACH = 8, 5, 4
# Steps of fewer tokens than most prompts have, and a pool that is dry before all rows are long.
BLOCK_SIZE, NUM_BLOCKS, MAX_STEP_TOKENS, MAX_ROWS = 4, 44, 24, 8
MAX_PROMPT, MAX_NEW_TOKENS = 80, 24
SEED = 41


def adapter_options(names: Names) -> list[dict[str, Any]]:
    """Return the LoraConfig options of eight adapters of different kinds and ranks."""
    return [
        some(names, r=1),
        some(names, r=2, use_rslora=True),
        some(names, r=4, use_dora=True, target_modules=[names.queries, *names.more]),
        some(names, r=8, bias="lora_only", lora_bias=True),
        some(names, r=16, use_dora=True, use_rslora=True, bias="lora_only"),
        some(names, r=32, modules_to_save=["lm_head"]),
        some(names, r=64, target_modules=[names.queries, names.outputs, *names.more]),
        some(names, r=4, target_modules=[names.queries, names.embedding, "lm_head"]),
    ]


def names_of(family: str) -> Names:
    """Return how a family names its modules; the layers of Qwen3-MoE are Mixtral's."""
    return NAMED.get(family) or Names("q_proj", "o_proj", "embed_tokens", "layers", LLAMA.more[:1])


@dataclass(frozen=True, slots=True)
class World:
    """A tiny model and its adapters, as files; ranks write what they computed beside them."""

    root: Path

    @property
    def model_dir(self) -> Path:
        """The model's folder."""
        return self.root / "model"

    def adapter_dir(self, number: int) -> Path:
        """The folder of adapter 1, 2, …, as PEFT saved it."""
        return self.root / f"adapter-{number}"

    def result(self, world_size: int, rank: int) -> Path:
        """Where a rank writes its tokens and logits."""
        return self.root / f"of-{world_size}-rank-{rank}.safetensors"

    def config(self, world_size: int, rank: int) -> ShardConfig:
        """Return what a rank is told."""
        return ShardConfig(
            model_dir=str(self.model_dir),
            model_id="tiny",
            rank=rank,
            world_size=world_size,
            shard_uris=["unix:///unused"] * world_size,
            rendezvous=f"file://{self.root}/meeting-of-{world_size}",
            group_timeout_s=600.0,
            block_size=BLOCK_SIZE,
            num_blocks=NUM_BLOCKS,
            num_threads=1,
            adapter_store_dir=str(self.root / "store"),
        )


def make_world(family: str, root: Path) -> World:
    """Write a tiny model and its adapters, and put those into the store as a fetcher would."""
    from lorax_shard.adapters.setup import make_store
    from lorax_shard.model.describe import describe

    world = World(root)
    make_tiny_model(family, world.model_dir)
    store = make_store(world.config(1, 0))
    base = describe(load_model(world.model_dir))
    parts = {}
    for number, options in enumerate(adapter_options(names_of(family)), 1):
        folder = save_adapter(world.model_dir, world.adapter_dir(number), seed=number, **options)
        parts[number] = dataclasses.astuple(put_adapter(store, folder, base))
    (root / "parts.json").write_text(json.dumps(parts))
    return world


def requests(seed: int) -> list[RequestSpec]:
    """Return requests for the base model and each adapter, in a shuffled order."""
    rng = random.Random(seed)
    users = [number for number in range(NUM_ADAPTERS + 1) for _ in range(REQUESTS_EACH)]
    rng.shuffle(users)
    made = []
    for number, adapter in enumerate(users, 1):
        prompt = [rng.randrange(3, VOCAB_SIZE) for _ in range(rng.randint(1, MAX_PROMPT))]
        row = new_row(
            number, prompt, max_new_tokens=rng.randint(8, MAX_NEW_TOKENS), ignore_eos=number % 2 > 0
        )
        made.append(using(row, adapter).spec)
    return made


class Recorder:
    """Computes passes as the engine does, and keeps the logits of each token drawn.

    Where passes fail each seventh of those of several rows does, before the ranks met in it or
    behind that.
    """

    def __init__(self, run_pass: Any, *, passes_fail: bool) -> None:
        self._run_pass = run_pass
        self._passes_fail = passes_fail
        self._num_passes = 0
        # By request and number of the output token.
        self.logits: dict[tuple[int, int], torch.Tensor] = {}

    def run_pass(self, *work: Any) -> Any:
        """Compute and note the logits."""
        has_several = len(work[-1]) > 1
        self._num_passes += has_several
        fails = self._passes_fail and has_several and self._num_passes % 7 == 0
        if fails and self._num_passes % 2:
            raise RuntimeError("planted before a pass")
        result = self._run_pass(*work)
        if fails:
            raise RuntimeError("planted behind a pass")
        for line, row in zip(result.logits, result.inputs.sampled, strict=False):
            place = row.num_tokens - row.num_prompt_tokens
            self.logits[row.request_id, place] = line.clone()
        return result


class WholeSteps:
    """An engine whose steps are whole when they are launched: each rank knows what rank 0 told."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def launch(self, plan: StepPlan) -> StepOutcome:
        """Execute a step."""
        outcome: StepOutcome = self._engine.step(plan)
        return outcome

    def collect(self, outcome: StepOutcome) -> StepOutcome:
        """Return what came of it."""
        return outcome


def run_worlds(roots: list[Path], world_size: int) -> None:
    """Serve every world's requests by a group of processes; each rank writes its results."""
    mp.spawn(_run_rank, (world_size, [str(root) for root in roots]), nprocs=world_size)


def _run_rank(rank: int, world_size: int, roots: list[str]) -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    for root in roots:
        _serve_world(World(Path(root)), world_size, rank)


def _serve_world(world: World, world_size: int, rank: int) -> None:
    from lorax_shard.app import load_parts
    from lorax_shard.engine import computation as computation_module

    engine = load_parts(world.config(world_size, rank)).engine
    spec = WarmupSpec(
        max_input_length=MAX_PROMPT, max_total_tokens=MAX_PROMPT + MAX_NEW_TOKENS,
        max_step_tokens=MAX_STEP_TOKENS, max_rows=MAX_ROWS,
    )  # fmt: skip
    num_blocks = engine.warm_up(spec)
    table = AdapterTable(max_resident=NUM_SLOTS, cycle_time_s=20.0)
    lane: Any = engine.adapters._lane
    for number, part in json.loads((world.root / "parts.json").read_text()).items():
        handle = AdapterHandle(int(number))
        lane.prepare(handle, AdapterContent(parts=(AdapterPart(*part),)))
        table.add(handle, 1)
    recorder = Recorder(computation_module.run_pass, passes_fail=world_size > 1)
    computation_module.run_pass = recorder.run_pass
    scheduler = Scheduler(
        num_blocks=num_blocks, block_size=BLOCK_SIZE, max_step_tokens=MAX_STEP_TOKENS,
        max_rows=MAX_ROWS, depth=2, adapters=table,
    )  # fmt: skip
    steps: Any = WholeSteps(engine)
    answers = serve(steps, scheduler, requests(SEED))
    computation_module.run_pass = recorder._run_pass
    if engine._group is not None:
        engine._group.close()
    tensors: dict[str, torch.Tensor] = {}
    for number, answer in answers.items():
        assert answer.error is None, answer.error
        ids = answer.tokens.ids
        tensors[f"{number}/tokens"] = torch.tensor(ids)
        tensors[f"{number}/logits"] = torch.stack(
            [recorder.logits[number, n] for n in range(len(ids))]
        )
    told = {"preemptions": str(scheduler.stats().num_preemptions)}
    save_file(tensors, world.result(world_size, rank), metadata=told)


@dataclass(frozen=True, slots=True)
class RankResult:
    """What one rank computed: tokens and logits by request."""

    tokens: dict[int, list[int]]
    logits: dict[int, torch.Tensor]
    num_preemptions: int


def read_result(path: Path) -> RankResult:
    """Read what a rank wrote."""
    with safe_open(path, framework="pt") as file:
        found = {key: file.get_tensor(key) for key in sorted(file.keys())}
        told = file.metadata()
    numbers = sorted(int(key.partition("/")[0]) for key in found if key.endswith("/tokens"))
    return RankResult(
        {number: found[f"{number}/tokens"].tolist() for number in numbers},
        {number: found[f"{number}/logits"] for number in numbers},
        int(told["preemptions"]),
    )


def results_of(world: World) -> Iterator[tuple[int, list[RankResult]]]:
    """Return the results of all ranks, by number of ranks."""
    for size in WORLD_SIZES:
        yield size, [read_result(world.result(size, rank)) for rank in range(size)]
