"""Programs of models without output: states, and so vectors and scores, are those of launched passes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.helpers.encoder_models import ENCODERS, LONGEST, make_tiny_encoder
from tests.helpers.tiny_models import make_tiny_model

from lorax_contract.config import ShardConfig
from lorax_shard.lora.dummy import loaded_samples
from lorax_shard.lora.prepared import LinearChange
from lorax_shard.model.hf_model import HFPagedModel
from lorax_shard.model.interface import GraphSettings, PassNumbers
from lorax_shard.model.launch import launched
from lorax_shard.model.loader import load_paged_model
from lorax_shard.model.programs.passes import PassPrograms
from lorax_shard.model.programs.scaled import Size
from lorax_shard.model.programs.trial import ProgramTrial

SETTINGS = GraphSettings(max_rows=8, max_context=LONGEST, max_rank=8, max_slots=4)
# Why passes of these are none: with adapters terms of distances follow the lengths of rows.
WITH_ADAPTERS = {
    "deberta": "the model's code looks at the lengths of rows",
    "deberta-v2": "the model's code looks at the lengths of rows",
}
# The first release's norm is one of its own.
LAUNCHED = {"deberta": "aten.add.Tensor stands between kernels"}
SIZES = (Size(1, 1), Size(1, 0), Size(9, 2), Size(40, 0), Size(23, 23))


def loaded(path: Path, task: str = "auto") -> HFPagedModel:
    config = ShardConfig(
        model_id="tiny", model_dir=str(path), shard_uris=["unix:///unused"],
        linear_backend="panel", adapters=True, adapter_store_dir="unused", task=task,
    )  # fmt: skip
    model = load_paged_model(config)
    model.allocate_cache(64, 4)
    model.capture_graphs(SETTINGS)
    return model


def states_of(
    model: HFPagedModel, numbers: PassNumbers, tokens: Sequence[int] | None = None
) -> torch.Tensor | None:
    """Return what a program gives for some tokens of a pass, or for all; None: none computes it."""
    assert model.graphs is not None
    asked = np.arange(len(numbers.input_ids)) if tokens is None else np.array(tokens, np.int64)
    found = model.graphs.run_with_states(numbers, asked)
    return None if found is None else found[1].clone()


def launched_states(model: HFPagedModel, numbers: PassNumbers) -> torch.Tensor:
    with model.keeping_hidden() as kept:
        launched(model, numbers)
    return kept.states


def new_trial(model: HFPagedModel) -> ProgramTrial:
    return ProgramTrial(
        model._pool, model.vocab_size, SETTINGS.max_context, is_whole=model.is_encoder
    )


@pytest.mark.parametrize("family", sorted(set(ENCODERS) - LAUNCHED.keys()))
@torch.inference_mode()
def test_passes_of_any_size_are_those_that_are_launched(family: str, tmp_path: Path) -> None:
    model = loaded(make_tiny_encoder(family, tmp_path))
    trial = new_trial(model)
    assert model.lora is not None
    with loaded_samples(model.lora, 6) as slots:
        for of_rows in ([], slots):
            if of_rows and family in WITH_ADAPTERS:
                assert states_of(model, trial.numbers(SIZES[2], of_rows)) is None
                continue
            for size in SIZES:
                numbers = trial.numbers(size, of_rows)
                assert numbers.context_lens == numbers.query_lens
                found = states_of(model, numbers)
                assert found is not None
                assert torch.equal(found, launched_states(model, numbers))
                alike = numbers._replace(segments=None)
                found = states_of(model, alike)
                assert found is not None
                expected = launched_states(model, alike)
                assert torch.equal(found, expected)
                check_some(model, numbers._replace(segments=None), expected)


def check_some(model: HFPagedModel, numbers: PassNumbers, expected: torch.Tensor) -> None:
    """Compare what is given for some tokens alone: first ones, last ones, neighbours, any other."""
    programs = model.graphs
    assert isinstance(programs, PassPrograms)
    # Tokens that nobody asks for are left out of the last layer, be they ever so few.
    assert programs._least_unasked is not None
    programs._least_unasked = 1
    ends = np.cumsum(numbers.query_lens)
    num_tokens = len(numbers.input_ids)
    for tokens in (ends - numbers.query_lens, ends - 1, np.arange(num_tokens)[1::3],
                   np.arange(num_tokens)[2:7], np.arange(num_tokens)[::-2], np.arange(0)):  # fmt: skip
        found = states_of(model, numbers, tokens)
        assert found is not None
        assert torch.equal(found, expected[tokens.copy()])


@pytest.mark.parametrize("family", LAUNCHED)
def test_a_family_with_other_operations_is_launched(
    family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        model = loaded(make_tiny_encoder(family, tmp_path))
    assert f"computed kernel by kernel: {LAUNCHED[family]}" in caplog.text
    assert states_of(model, new_trial(model).numbers(Size(9, 2), [])) is None


@torch.inference_mode()
def test_a_decoder_for_vectors_has_programs(tmp_path: Path) -> None:
    make_tiny_model("llama", tmp_path)
    model = loaded(tmp_path, "embed")
    assert not model.generates
    trial = new_trial(model)
    with trial.filled_cache():
        numbers = trial.numbers(Size(23, 5), [])
        found = states_of(model, numbers)
        assert found is not None
        assert torch.equal(found, launched_states(model, numbers))


@torch.inference_mode()
def test_what_adapters_change_behind_a_pass_leaves_it_a_program(tmp_path: Path) -> None:
    """Classifiers come with heads of their own, which make scores of what the pass gave."""
    model = loaded(make_tiny_encoder("bert", tmp_path))
    lora, trial = model.lora, new_trial(model)
    assert lora is not None
    with loaded_samples(lora, 4) as slots:
        numbers = trial.numbers(Size(9, 2), [])._replace(slots=[slots[0]] * 2)
        adapter = lora._slots[slots[0]]
        for name, is_program in (
            ("sequence_head.classifier", True),
            ("sequence_head.pooler.dense", True),
            ("encoder.layer.0.output.dense", False),
        ):
            lora.unload(slots[0])
            width = lora.sites[name].widths[1]
            scale = LinearChange(scale=torch.full((width,), 0.5))
            lora.load(slots[0], replace(adapter, linears={name: scale}))
            assert (states_of(model, numbers) is not None) is is_program, name


@torch.inference_mode()
def test_the_last_layer_leaves_out_what_nobody_asks_for(tmp_path: Path) -> None:
    """From the last layer's attention on kernels see the asked tokens alone, K and V those of all."""
    model = loaded(make_tiny_encoder("bert", tmp_path))
    programs = model.graphs
    assert isinstance(programs, PassPrograms)
    calls = programs._programs[False]._calls
    assert calls.can_narrow
    last_attention = max(i for i, name in enumerate(calls.names) if "attend" in name)
    assert calls.first_by_row == last_attention
    ran: list[int] = []

    def run(kernels: int, starts: int, small: int, number: int, *rest: Any) -> None:
        ran.append(number)
        own(kernels, starts, small, number, *rest)

    own, calls._run = calls._run, run
    try:
        numbers = new_trial(model).numbers(Size(40, 0), [])
        for asked, parts in ((40, 1), (9, 1), (8, 2), (1, 2)):
            ran.clear()
            states_of(model, numbers, range(asked))
            assert len(ran) == parts
            assert sum(ran) == len(calls.names)
    finally:
        calls._run = own


@torch.inference_mode()
def test_rows_do_not_see_each_other(tmp_path: Path) -> None:
    model = loaded(make_tiny_encoder("bert", tmp_path))
    numbers = new_trial(model).numbers(Size(12, 4), [])
    both = states_of(model, numbers)
    last = numbers.query_lens[-1]
    alone = states_of(
        model,
        PassNumbers(
            numbers.input_ids[-last:], numbers.positions[-last:], numbers.kv_slots[-last:],
            numbers.tables[-1:], [last], [last], 0, np.arange(0), [None], [last],
            segments=numbers.segments[-last:] if numbers.segments is not None else None,
        ),
    )  # fmt: skip
    assert both is not None
    assert alone is not None
    assert torch.equal(both[-last:], alone)
