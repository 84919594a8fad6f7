"""An engine whose decode steps are graphs gives the tokens of one that launches them."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path

import pytest
from tests.helpers.drive_engine import Answer, serve
from tests.helpers.tiny_models import VOCAB_SIZE, make_tiny_model, make_tokenizer
from tests.helpers.traced_graph import TracingRecorder

from lorax_contract.config import ShardConfig
from lorax_contract.step import (
    AdapterHandle,
    RequestId,
    RequestSpec,
    SamplingParams,
    StoppingParams,
    WarmupSpec,
)
from lorax_router.core.adapters.table import AdapterTable
from lorax_router.core.scheduler import Scheduler
from lorax_shard.attention.triton import backend as triton_backend
from lorax_shard.attention.triton import fixed
from lorax_shard.engine.engine import Engine
from lorax_shard.engine.graph_limits import GraphLimits
from lorax_shard.engine.memory import PoolSettings
from lorax_shard.lora.dummy import sample_adapter
from lorax_shard.lora.prepared import PreparedAdapter
from lorax_shard.model.loader import load_paged_model
from lorax_shard.sampling.batched import draw_batch
from lorax_shard.sampling.sampler import Sampler

BLOCK_SIZE, NUM_BLOCKS, MAX_ROWS = 4, 20, 3


class Lane(dict[AdapterHandle, "Ready"]):
    """Prepared adapters by handle."""

    ready = dict.get


class Ready:
    vocabulary = None
    vocab_size = 0
    invocation_ids = ()
    head = ""

    def __init__(self, prepared: PreparedAdapter) -> None:
        self.prepared = prepared


def world(path: Path, recorder: TracingRecorder | None) -> tuple[Engine, Scheduler]:
    """Return an engine whose ids stay on the device, with graphs where there is a recorder."""
    model = load_paged_model(
        ShardConfig(
            model_id="tiny", model_dir=str(path), shard_uris=["unix:///unused"],
            attention_backend="triton", lora_backend="triton", linear_backend="torch",
            elementwise_backend="torch", block_size=BLOCK_SIZE,
        )
    )  # fmt: skip
    assert model.lora is not None
    lane, table = Lane(), AdapterTable(max_resident=1, cycle_time_s=2.0)
    for number in (1, 2):
        lane[AdapterHandle(number)] = Ready(sample_adapter(model.lora.sites, 2 * number, number))
        table.add(AdapterHandle(number), 1)
    engine = Engine(
        model, make_tokenizer(path),
        PoolSettings(block_size=BLOCK_SIZE, memory_fraction=0.5, num_blocks=NUM_BLOCKS),
        adapters=lane, graphs=None if recorder is None else GraphLimits(MAX_ROWS, 8, 2),
    )  # fmt: skip
    engine.computation.sampler = Sampler(model.vocab_size, method=draw_batch)
    if recorder is not None:
        model.graph_bytes = lambda settings: 0  # type: ignore[method-assign]
        model.capture_graphs = partial(model.capture_graphs, recorder=recorder)  # type: ignore[method-assign]
    engine.warm_up(
        WarmupSpec(max_input_length=8, max_total_tokens=20, max_step_tokens=8, max_rows=MAX_ROWS)
    )
    scheduler = Scheduler(
        num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, max_step_tokens=8, max_rows=MAX_ROWS,
        depth=2, adapters=table,
    )  # fmt: skip
    return engine, scheduler


def requests() -> list[RequestSpec]:
    """Rows of the base model and of two adapters that take turns; greedy and drawn."""
    random_ids = random.Random(5)
    return [
        RequestSpec(
            request_id=RequestId(number),
            prompt_ids=[random_ids.randrange(VOCAB_SIZE) for _ in range(1 + number)],
            sampling=SamplingParams(
                do_sample=number % 2 == 1, temperature=0.9, top_p=0.9, seed=number
            ),
            stopping=StoppingParams(max_new_tokens=4 + number, ignore_eos=True),
            adapter=AdapterHandle(number % 3),
        )
        for number in range(7)
    ]


def tokens(answers: dict[RequestId, Answer]) -> dict[RequestId, list[int]]:
    assert all(answer.error is None for answer in answers.values())
    return {request_id: answer.tokens.ids for request_id, answer in answers.items()}


def test_tokens_are_those_of_launched_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (triton_backend, fixed):
        monkeypatch.setattr(module, "num_processors", lambda device: 1)
    make_tiny_model("llama", tmp_path, num_hidden_layers=1)
    expected = tokens(serve(*world(tmp_path, None), requests()))
    assert [len(each) for each in expected.values()] == [4 + number for number in range(7)]
    recorder = TracingRecorder()
    engine, scheduler = world(tmp_path, recorder)
    checked = recorder.num_replayed
    assert checked == 6
    assert tokens(serve(engine, scheduler, requests())) == expected
    # Nearly all decodes: those of two adapters do not meet.
    assert recorder.num_replayed - checked > 15
