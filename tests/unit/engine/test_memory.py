"""How the KV pool is sized."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.helpers.toy_paged_model import BLOCK_SIZE, ToyModel

from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_contract.step import WarmupSpec
from lorax_shard.engine import memory
from lorax_shard.engine.memory import PoolSettings, measure_peak, size_pool

BLOCK_BYTES = 16 * BLOCK_SIZE
SPEC = WarmupSpec(max_input_length=32, max_total_tokens=40, max_step_tokens=16, max_rows=5)


@pytest.fixture(autouse=True)
def no_peak(monkeypatch):
    """The toy's step takes no memory worth measuring; what is free is said by each test."""

    def run_only(_device, run):
        run()
        return 1000

    monkeypatch.setattr(memory, "measure_peak", run_only)


def no_step():
    """Take no memory."""


def free(monkeypatch, count):
    monkeypatch.setattr(memory, "free_bytes", lambda _device: count)


def settings(**values):
    return PoolSettings(**{"block_size": BLOCK_SIZE, "memory_fraction": 0.5, **values})


def test_adapters_get_their_share_before_the_pool_does(monkeypatch):
    free(monkeypatch, 200 * BLOCK_BYTES)
    plan = size_pool(ToyModel(), settings(adapter_fraction=0.25), SPEC, no_step)
    assert plan.adapter_bytes == dict(plan.items)["adapters"]
    assert plan.adapter_bytes <= 50 * BLOCK_BYTES
    left = 200 * BLOCK_BYTES - dict(plan.items)["activations"] - plan.adapter_bytes
    assert plan.num_blocks == left // 2 // BLOCK_BYTES


def test_the_pool_takes_its_share_of_what_the_largest_step_leaves(monkeypatch):
    free(monkeypatch, 1000 + 200 * BLOCK_BYTES)
    model = ToyModel()
    plan = size_pool(model, settings(), SPEC, no_step)
    assert plan.num_blocks == 100
    assert dict(plan.items) == {
        "weights": 1000,
        "activations": 1000,
        "kv cache": 100 * BLOCK_BYTES,
        "adapters": 0,
    }


def test_the_callers_limit_holds(monkeypatch):
    free(monkeypatch, 10**9)
    limited = WarmupSpec(
        max_input_length=32, max_total_tokens=40, max_step_tokens=16, max_rows=5, max_blocks=7
    )
    assert size_pool(ToyModel(), settings(), limited, no_step).num_blocks == 7


def test_a_fixed_number_of_blocks_is_taken_if_it_fits(monkeypatch):
    free(monkeypatch, 1000 + 20 * BLOCK_BYTES)
    assert size_pool(ToyModel(), settings(num_blocks=3), SPEC, no_step).num_blocks == 3
    with pytest.raises(StartupError, match="21 blocks") as caught:
        size_pool(ToyModel(), settings(num_blocks=21), SPEC, no_step)
    assert caught.value.exit_code is ExitCode.OUT_OF_MEMORY


def test_too_little_for_one_longest_request_is_said_in_words(monkeypatch):
    free(monkeypatch, 1000 + 19 * BLOCK_BYTES)
    with pytest.raises(StartupError, match="lower --max-total-tokens") as caught:
        size_pool(ToyModel(), settings(), SPEC, no_step)
    assert caught.value.exit_code is ExitCode.OUT_OF_MEMORY


def test_only_the_required_length_must_fit(monkeypatch):
    free(monkeypatch, 1000 + 8 * BLOCK_BYTES)
    required = replace(SPEC, required_tokens=4 * BLOCK_SIZE)
    assert size_pool(ToyModel(), settings(), required, no_step).num_blocks == 4
    more = replace(SPEC, required_tokens=4 * BLOCK_SIZE + 1)
    with pytest.raises(StartupError, match="needs 5 blocks"):
        size_pool(ToyModel(), settings(), more, no_step)


def test_a_step_that_does_not_fit_is_said_in_words(monkeypatch):
    def no_memory(_device, _run):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory")

    monkeypatch.setattr(memory, "measure_peak", no_memory)
    with pytest.raises(StartupError, match="16 tokens in 5 rows"):
        size_pool(ToyModel(), settings(), SPEC, no_step)


def test_other_failures_of_the_largest_step_are_not_called_memory(monkeypatch):
    def broken(_device, _run):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(memory, "measure_peak", broken)
    with pytest.raises(RuntimeError, match="shapes differ"):
        size_pool(ToyModel(), settings(), SPEC, no_step)


def test_peaks_between_start_and_end_are_seen(monkeypatch):
    monkeypatch.undo()
    size = 64 * 2**20

    def spike():
        block = torch.ones(size, dtype=torch.uint8)
        for _ in range(20):
            block.add_(1)

    assert measure_peak(torch.device("cpu"), spike) > size // 2
    assert memory.free_bytes(torch.device("cpu")) > 0
