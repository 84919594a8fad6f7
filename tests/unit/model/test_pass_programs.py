"""Programs of passes compute, bit for bit, what the model's own code computes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.helpers.tiny_models import make_tiny_model
from torch import nn

from lorax_contract.config import Quantize, ShardConfig
from lorax_shard.fused.backend import RmsNorm
from lorax_shard.fused.cpp import CppElementwise
from lorax_shard.lora.dummy import loaded_samples
from lorax_shard.lora.prepared import LinearChange
from lorax_shard.model.hf_model import HFPagedModel
from lorax_shard.model.interface import GraphSettings, IdArray, PassNumbers, UnreadIds
from lorax_shard.model.launch import launched
from lorax_shard.model.loader import load_paged_model
from lorax_shard.model.programs.asked import asked_rows
from lorax_shard.model.programs.passes import PassPrograms
from lorax_shard.model.programs.recorder import NotAProgramError, record
from lorax_shard.model.programs.scaled import Size
from lorax_shard.model.programs.trial import ProgramTrial

BLOCK_SIZE, NUM_BLOCKS = 4, 24
SETTINGS = GraphSettings(max_rows=8, max_context=64, max_rank=8, max_slots=4)
FAMILIES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "granite",
    "olmo2",
    "glm4",
)
SIZES = (Size(1, 1), Size(1, 0), Size(3, 3), Size(9, 2), Size(50, 1), Size(23, 23))


def loaded(path: Path, family: str, quantize: Quantize = "none") -> HFPagedModel:
    make_tiny_model(family, path)
    config = ShardConfig(
        model_id="tiny", model_dir=str(path), shard_uris=["unix:///unused"],
        linear_backend="panel", quantize=quantize,
    )  # fmt: skip
    model = load_paged_model(config)
    model.allocate_cache(NUM_BLOCKS, BLOCK_SIZE)
    model.capture_graphs(SETTINGS)
    return model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> HFPagedModel:
    return loaded(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture
def trial(model: HFPagedModel) -> Iterator[ProgramTrial]:
    trial = trial_of(model)
    with torch.inference_mode(), trial.filled_cache():
        yield trial


def trial_of(model: HFPagedModel) -> ProgramTrial:
    return ProgramTrial(model._pool, model.vocab_size, SETTINGS.max_context)


def check(model: HFPagedModel, trial: ProgramTrial, numbers: PassNumbers) -> torch.Tensor:
    """Compare a pass and what it leaves in the cache with the launched one; return its logits."""
    programs = model.graphs
    assert isinstance(programs, PassPrograms)
    # Tokens that nobody asks for are left out of the last layer, be they ever so few.
    assert programs._least_unasked is not None
    programs._least_unasked = 1
    found = trial._results(programs.run, numbers)
    with model.keeping_hidden() as kept:
        expected = trial._results(lambda each: launched(model, each), numbers)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    # What the last layer gives for all tokens, of which vectors are made.
    num_tokens = len(numbers.input_ids)
    for tokens in (np.arange(num_tokens), np.arange(0, num_tokens, 3)):
        results = programs.run_with_states(numbers, tokens)
        assert results is not None
        assert torch.equal(results[0], expected[0])
        assert torch.equal(results[1], kept.states[torch.from_numpy(tokens)])
    return found[0]


@pytest.mark.parametrize(
    ("family", "quantize"), [*((each, "none") for each in FAMILIES), ("llama", "int8")]
)
def test_passes_of_any_size_are_those_that_are_launched(
    family: str, quantize: Quantize, tmp_path: Path
) -> None:
    model = loaded(tmp_path, family, quantize)
    trial = trial_of(model)
    assert model.lora is not None
    with (
        torch.inference_mode(),
        trial.filled_cache(),
        loaded_samples(model.lora, 6) as slots,
    ):
        for of_rows in ([], slots):
            for size in SIZES:
                check(model, trial, trial.numbers(size, of_rows))


def test_ids_that_were_just_drawn_are_taken(model: HFPagedModel, trial: ProgramTrial) -> None:
    numbers = trial.numbers(Size(5, 5), [])
    drawn = torch.tensor([7, -1, 9])
    numbers = numbers._replace(unread=UnreadIds(drawn, np.array([0, 2, 4]), np.array([2, 0, 1])))
    check(model, trial, numbers)


def test_what_is_asked_may_come_in_any_order_and_twice(
    model: HFPagedModel, trial: ProgramTrial
) -> None:
    assert model.lora is not None
    with loaded_samples(model.lora, 6) as slots:
        numbers = trial.numbers(Size(12, 4), slots)
        asked = np.array([11, 2, 3, 4, 5, 6, 3, 0])
        check(model, trial, numbers._replace(logit_rows=asked))


def test_neighbours_that_are_asked_for_are_one_row(trial: ProgramTrial) -> None:
    numbers = trial.numbers(Size(10, 1), [])._replace(
        query_lens=[1, 4, 5],
        context_lens=[7, 4, 30],
    )
    found = asked_rows(numbers, np.array([9, 0, 1, 2, 3, 5, 6, 8, 7]))
    assert found.rows.tolist() == [2, 0, 1, 2, 2, 2]
    assert found.query_lens.tolist() == [1, 1, 3, 2, 1, 1]
    assert found.positions.tolist() == [29, 6, 0, 25, 28, 27]


@pytest.mark.parametrize(
    ("quantize", "product"), [("none", "lorax_panel_gated"), ("int8", "lorax_quantized_linear")]
)
def test_products_gate_their_own_columns_where_nothing_is_added_to_them(
    quantize: Quantize, product: str, tmp_path: Path
) -> None:
    programs = loaded(tmp_path, "llama", quantize).graphs
    assert isinstance(programs, PassPrograms)
    without, with_adapters = (programs._programs[each]._calls.names for each in (False, True))
    assert product in without
    assert ("lorax_gated" in without) == (quantize != "none")
    assert "lorax_gated" in with_adapters
    assert "lorax_panel_gated" not in with_adapters


def test_the_last_layer_leaves_out_what_nobody_asks_for(
    model: HFPagedModel, trial: ProgramTrial
) -> None:
    """Kernels behind the last layer's keys and values see the asked tokens alone; without any, none runs."""
    programs = model.graphs
    assert isinstance(programs, PassPrograms)
    program = programs._programs[False]
    calls, ran = program._calls, []

    def run(kernels: int, starts: int, small: int, number: int, *rest: Any) -> None:
        ran.append(number)
        own(kernels, starts, small, number, *rest)

    own, calls._run = calls._run, run
    try:
        for asked, parts in ((0, 1), (2, 2), (40, 1)):
            ran.clear()
            numbers = trial.numbers(Size(40, 1), [])._replace(logit_rows=np.arange(asked))
            programs.run(numbers)
            assert len(ran) == parts
            assert (sum(ran) == program.num_calls) == bool(asked)
    finally:
        calls._run = own
    last_store = max(i for i, name in enumerate(calls.names) if name == "lorax_store")
    assert calls.first_by_row == last_store + 1


def test_a_narrowed_pass_that_gives_other_bits_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def wrong(numbers: PassNumbers, asked: IdArray) -> Any:
        rows = asked_rows(numbers, asked)
        return rows._replace(positions=np.zeros_like(rows.positions))

    monkeypatch.setattr("lorax_shard.model.programs.passes.asked_rows", wrong)
    with caplog.at_level(logging.INFO):
        model = loaded(tmp_path, "llama")
    assert "all tokens of a pass go through the whole last layer" in caplog.text
    programs = model.graphs
    assert isinstance(programs, PassPrograms)
    assert programs._least_unasked is None
    monkeypatch.undo()
    trial = trial_of(model)
    with torch.inference_mode(), trial.filled_cache():
        numbers = trial.numbers(Size(40, 1), [])
        found = trial._results(programs.run, numbers)
        expected = trial._results(lambda each: launched(model, each), numbers)
    assert torch.equal(found[0], expected[0])


def test_adapters_come_and_go_between_passes(model: HFPagedModel, trial: ProgramTrial) -> None:
    lora = model.lora
    assert lora is not None
    for _ in range(3):
        # Other matrices at other addresses each time.
        with loaded_samples(lora, 5) as slots:
            numbers = trial.numbers(Size(12, 3), [])
            numbers = numbers._replace(
                slots=slots[: len(numbers.slots)] + [None] * (len(numbers.slots) - 2)
            )
            changed = check(model, trial, numbers).clone()
            plain = check(model, trial, numbers._replace(slots=[None] * len(numbers.slots)))
            assert not torch.equal(changed, plain)


def test_what_changes_more_than_low_rank_parts_is_launched(
    model: HFPagedModel, trial: ProgramTrial
) -> None:
    lora, programs = model.lora, model.graphs
    assert lora is not None
    assert programs is not None
    name, site = next((n, s) for n, s in lora.sites.items() if n.endswith("down_proj"))
    with loaded_samples(lora, 4) as slots:
        numbers = trial.numbers(Size(4, 4), slots)
        assert programs.run(numbers._replace(slots=[slots[0]] * 4)) is not None
        adapter = lora._slots[slots[0]]
        lora.unload(slots[0])
        scale = LinearChange(scale=torch.full((site.widths[1],), 0.5))
        lora.load(slots[0], replace(adapter, linears={name: scale}))
        assert programs.run(numbers._replace(slots=[slots[0]] * 4)) is None
        assert programs.run(numbers._replace(slots=[slots[1]] * 4)) is not None


def test_slots_beyond_the_cache_are_refused(model: HFPagedModel, trial: ProgramTrial) -> None:
    numbers = trial.numbers(Size(3, 1), [])
    assert model.graphs is not None
    missing = NUM_BLOCKS * BLOCK_SIZE
    with pytest.raises(IndexError, match=f"no slot {missing}"):
        model.graphs.run(numbers._replace(kv_slots=np.array([0, missing, 1])))


def test_results_do_not_depend_on_passes_before(model: HFPagedModel, trial: ProgramTrial) -> None:
    """Memory is used again: neither larger passes nor smaller ones leave anything behind."""
    small, large = trial.numbers(Size(2, 2), []), trial.numbers(Size(60, 9), [])
    first = check(model, trial, small).clone()
    check(model, trial, large)
    assert torch.equal(check(model, trial, small), first)


def test_a_family_with_other_operations_is_launched(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        model = loaded(tmp_path, "gpt2")
    assert (
        "computed kernel by kernel: aten.layer_norm.default stands between kernels" in caplog.text
    )
    trial = trial_of(model)
    with torch.inference_mode(), trial.filled_cache():
        assert model.graphs is not None
        assert model.graphs.run(trial.numbers(Size(3, 1), [])) is None


def recorded(*calls: Callable[[torch.Tensor], Any]) -> None:
    """Record what calls do to something that a kernel computed from the input, one after the other."""
    backend, weight = CppElementwise(), torch.ones(8)

    def compute() -> torch.Tensor:
        x = torch.ones(3, 8)
        for call in calls:
            y = backend.rms_norm(x, weight, RmsNorm(1e-5, 0.0))
            x = call(y)
        return backend.rms_norm(x, weight, RmsNorm(1e-5, 0.0)) if calls[1:] else x

    with torch.inference_mode():
        record(compute, {})


@pytest.mark.parametrize(
    ("calls", "words"),
    [
        ([lambda y: y.sigmoid(), lambda y: y], "sigmoid.default stands between kernels"),
        ([lambda y: y * float(y[0, 0])], "looks at a number of the pass"),
        ([lambda y: y[y.nonzero()[:, 0]]], "looks at a number of the pass"),
        ([lambda y: y if torch.equal(y, y + 1) else -y], "looks at a number of the pass"),
        ([lambda y: y.add_(1)], "add_.Tensor changes what a kernel computed"),
        ([lambda y: y if y.sum() > 0 else -y], "looks at a number of the pass"),
    ],
)
def test_what_no_program_repeats_is_named(calls: Sequence[Any], words: str) -> None:
    with pytest.raises(NotAProgramError, match=words):
        recorded(*calls)


def test_conversions_to_what_a_tensor_is_are_no_operations() -> None:
    backend, weight, x = CppElementwise(), torch.ones(8), torch.ones(3, 8)

    def compute() -> torch.Tensor:
        return backend.rms_norm((x + 1).to(torch.float32), weight, RmsNorm(1e-5, 0.0))

    with torch.inference_mode():
        recording = record(compute, {"x": x})
    assert [each.function for each in recording.before.values()] == [torch.ops.aten.add.Tensor]


def test_operations_that_nobody_needs_are_left_out(model: HFPagedModel) -> None:
    programs = model.graphs
    assert programs is not None
    computed = [each._function for _, each in programs._programs[False]._before]
    assert torch.ops.aten.embedding.default in computed
    assert torch.ops.aten.detach.default not in computed


def test_operations_behind_the_last_kernel_are_torchs(model: HFPagedModel) -> None:
    recorded(lambda y: (y / 30).tanh() * 30)


def test_a_model_that_changes_its_weights_is_launched() -> None:
    weight = nn.Parameter(torch.ones(3), requires_grad=False)
    with (
        pytest.raises(NotAProgramError, match="changes a tensor of the model"),
        torch.inference_mode(),
    ):
        record(lambda: weight.mul_(2), {})
