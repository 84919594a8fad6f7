"""Graphs of decode steps give what the same steps give when they are launched."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.helpers.tiny_models import make_tiny_model
from tests.helpers.traced_graph import TracingRecorder

from lorax_contract.config import ShardConfig
from lorax_shard.attention.triton import backend as triton_backend
from lorax_shard.attention.triton import fixed
from lorax_shard.lora.dummy import loaded_samples
from lorax_shard.lora.prepared import LinearChange
from lorax_shard.model.graphs.trial import GraphTrial
from lorax_shard.model.hf_model import HFPagedModel
from lorax_shard.model.interface import GraphSettings, PassNumbers, UnreadIds
from lorax_shard.model.launch import launched
from lorax_shard.model.loader import load_paged_model

Captured = tuple[HFPagedModel, TracingRecorder]

BLOCK_SIZE, MAX_BLOCKS = 4, 6
SETTINGS = GraphSettings(max_rows=3, max_context=MAX_BLOCKS * BLOCK_SIZE, max_rank=8, max_slots=4)


def loaded(path: Path, family: str = "llama", **backends: str) -> HFPagedModel:
    """Return a tiny model that computes as on a GPU: by kernels that read on the device."""
    make_tiny_model(family, path, **({"num_hidden_layers": 1} if family == "llama" else {}))
    chosen = {
        "attention_backend": "triton", "lora_backend": "triton", "linear_backend": "torch",
        "elementwise_backend": "triton", **backends,
    }  # fmt: skip
    model = load_paged_model(
        ShardConfig(model_id="tiny", model_dir=str(path), shard_uris=["unix:///unused"], **chosen)  # type: ignore[arg-type]
    )
    model.allocate_cache(24, BLOCK_SIZE)
    return model


@pytest.fixture(scope="module", autouse=True)
def one_processor() -> Iterator[None]:
    """Have few splits: the interpreter computes programs one after the other."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (triton_backend, fixed):
            patch.setattr(module, "num_processors", lambda device: 1)
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> HFPagedModel:
    return loaded(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> Captured:
    """A model with graphs of 1 to 3 rows, without adapters and with them."""
    model, recorder = loaded(tmp_path_factory.mktemp("captured")), TracingRecorder()
    model.capture_graphs(SETTINGS, recorder)
    assert recorder.num_recorded == 2 * 3
    return model, recorder


@contextmanager
def rows_of(model: HFPagedModel, num_rows: int) -> Iterator[GraphTrial]:
    trial = GraphTrial(model._pool, num_rows, MAX_BLOCKS)
    trial.num_rows = num_rows
    with torch.inference_mode(), trial.filled_cache():
        yield trial


def check(model: HFPagedModel, trial: GraphTrial, numbers: PassNumbers) -> None:
    """Compare a step's logits and what it leaves in the cache with those of the launched one."""
    graphs = model.graphs
    assert graphs is not None

    def cache_after(call: Callable[[], torch.Tensor | None]) -> tuple[torch.Tensor, ...]:
        for part, before in zip(trial._pools, trial._before, strict=True):
            part.copy_(before)
        logits = call()
        assert logits is not None
        return tuple(each.clone() for each in (logits, *trial._pools))

    found = cache_after(lambda: graphs.run(numbers))
    expected = cache_after(lambda: launched(model, numbers))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_steps_of_any_rows_are_those_that_are_launched(captured: Captured) -> None:
    """The last ids of some known to the device alone, too."""
    model, recorder = captured
    before = recorder.num_replayed
    for num_rows in (1, 2, 3):
        with rows_of(model, num_rows) as trial:
            numbers = trial.numbers([], model.vocab_size)
            check(model, trial, numbers)
            drawn = torch.from_numpy(numbers.input_ids[::-1].copy())
            rows = np.arange(num_rows)
            for at, of in ((rows, rows), (rows[-1:], rows[:1]), (rows, rows[::-1].copy())):
                check(model, trial, numbers._replace(unread=UnreadIds(drawn, at, of)))
    assert recorder.num_replayed == before + 3 * 4


def test_logits_are_of_the_tokens_that_are_asked_for(captured: Captured) -> None:
    model, _ = captured
    with rows_of(model, 3) as trial:
        numbers = trial.numbers([], model.vocab_size)
        for asked in ([0, 2], [2, 1, 0], []):
            check(model, trial, numbers._replace(logit_rows=np.array(asked, dtype=np.int64)))


def test_adapters_come_and_go_between_replays(captured: Captured) -> None:
    model, _ = captured
    lora = model.lora
    assert lora is not None
    with rows_of(model, 3) as trial:
        for slots in ([0, 1, None], [1, 1, 0], [None, 0, None]):
            # Other matrices at other addresses each time.
            with loaded_samples(lora, 6):
                numbers = trial.numbers([], model.vocab_size)._replace(slots=slots)
                check(model, trial, numbers)
                found = model.graphs.run(numbers).clone()  # type: ignore[union-attr]
                plain = launched(model, numbers._replace(slots=[None] * 3))
                changed = (found - plain).abs().amax(dim=1) > 1e-4
                assert all(changed[row] for row, slot in enumerate(slots) if slot is not None)


def test_what_no_graph_computes_is_left_to_launches(
    captured: Captured, caplog: pytest.LogCaptureFixture
) -> None:
    """Prompts, more rows, longer contexts, and adapters that change more than low-rank parts; said once."""
    caplog.set_level(logging.INFO)
    model, _ = captured
    graphs, lora = model.graphs, model.lora
    assert graphs is not None
    assert lora is not None
    with rows_of(model, 2) as trial, loaded_samples(lora, 16) as slots:
        numbers = trial.numbers([], model.vocab_size)
        assert graphs.run(numbers) is not None
        assert graphs.run(numbers._replace(num_decode_rows=1)) is None
        wide = np.zeros((2, MAX_BLOCKS + 1), dtype=np.int64)
        assert graphs.run(numbers._replace(tables=wide)) is None
        four = numbers._replace(query_lens=[1] * 4, num_decode_rows=4)
        assert graphs.run(four) is None
        # Of rank 16, and of rank 8 with a bias of its own.
        scaled = replace(lora._slots[slots[1]], linears=some_change(model), digest="scaled")
        lora.unload(slots[1])
        lora.load(slots[1], scaled)
        for _ in range(2):
            for slot in slots:
                assert graphs.run(numbers._replace(slots=[None, slot])) is None
        lora.unload(slots[1])
        lora.load(slots[1], replace(scaled, linears={}, digest="low-rank"))
        check(model, trial, numbers._replace(slots=[None, slots[1]]))
    told = [each for each in caplog.messages if "changes more than graphs compute" in each]
    assert len(told) == 2
    assert "the adapter sample 0 " in told[0]


def some_change(model: HFPagedModel) -> dict[str, LinearChange]:
    assert model.lora is not None
    name, site = next(each for each in model.lora.sites.items() if each[0].endswith("q_proj"))
    return {name: LinearChange(shift=torch.ones(site.widths[1]))}


def test_more_adapters_than_room_leave_steps_with_them_to_launches(
    model: HFPagedModel, caplog: pytest.LogCaptureFixture
) -> None:
    """Their table is another one then; a graph would read the old one."""
    lora = model.lora
    assert lora is not None
    model.capture_graphs(replace(SETTINGS, max_rows=2), TracingRecorder())
    graphs = model.graphs
    assert graphs is not None
    with rows_of(model, 2) as trial, loaded_samples(lora, 4) as slots:
        numbers = trial.numbers([], model.vocab_size)
        last = lora._backend._slots.table.num_lines  # type: ignore[attr-defined]
        assert graphs.run(numbers._replace(slots=[None, slots[0]])) is not None
        lora.load(last, lora._slots[slots[0]])
        assert graphs.run(numbers._replace(slots=[None, slots[0]])) is None
        assert graphs.run(numbers) is not None
        lora.unload(last)
    assert sum("more adapters are in effect" in each for each in caplog.messages) == 1


# What a lost kernel would have written is whatever was there: it may overflow anywhere.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("place", [0, 9, -1])
def test_a_graph_that_differs_is_not_used(
    place: int, model: HFPagedModel, caplog: pytest.LogCaptureFixture
) -> None:
    """One that has lost a kernel, here and there."""

    def lose(steps: list[Callable[[], None]]) -> None:
        del steps[place]

    model.capture_graphs(replace(SETTINGS, max_rank=0, max_rows=2), TracingRecorder(lose))
    graphs: Any = model.graphs
    assert not graphs._replays
    told = [each for each in caplog.messages if "no graph computes steps of" in each]
    assert len(told) == 2
    assert "gave other bits than the same launches" in told[0]
    model.free_cache()
    assert model.graphs is None
    model.allocate_cache(24, BLOCK_SIZE)


def test_a_model_that_looks_at_lengths_on_the_host_has_no_graphs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Llama 4 scales queries by their positions, which are reckoned there."""
    model = loaded(tmp_path, "llama4_text")
    model.capture_graphs(replace(SETTINGS, max_rank=0), TracingRecorder())
    graphs: Any = model.graphs
    assert not graphs._replays
    (told,) = [each for each in caplog.messages if "no graph computes" in each]
    assert "the model looks at lengths on the host" in told


def test_a_backend_that_cannot_be_captured_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = loaded(tmp_path, attention_backend="sdpa", lora_backend="cpu")
    model.capture_graphs(SETTINGS, TracingRecorder())
    assert model.graphs is None
    assert "attention backend sdpa cannot be captured" in caplog.text


@pytest.mark.parametrize(
    "family",
    ["gemma2", *(pytest.param(each, marks=pytest.mark.slow) for each in ("gpt_oss", "qwen3"))],
)
def test_windows_softcaps_and_sinks_are_read_on_the_device(family: str, tmp_path: Path) -> None:
    model = loaded(tmp_path, family)
    settings = GraphSettings(
        max_rows=2, max_context=MAX_BLOCKS * BLOCK_SIZE, max_rank=4, max_slots=2
    )
    model.capture_graphs(settings, TracingRecorder())
    with rows_of(model, 2) as trial:
        check(model, trial, trial.numbers([], model.vocab_size))
