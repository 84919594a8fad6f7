"""How the KV pool is sized."""

from __future__ import annotations

import gc
import mmap
import time
from dataclasses import replace

import pytest
import torch
from tests.helpers.toy_paged_model import BLOCK_SIZE, ToyModel

from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_contract.step import WarmupSpec
from lorax_shard import device_memory
from lorax_shard.engine.memory import PoolSettings, size_pool

BLOCK_BYTES = 16 * BLOCK_SIZE
SPEC = WarmupSpec(max_input_length=32, max_total_tokens=40, max_step_tokens=16, max_rows=5)


ACTIVATIONS = 1000


def step() -> int:
    """Take no memory worth measuring, and say that it was something."""
    return ACTIVATIONS


def free(monkeypatch, count):
    monkeypatch.setattr(device_memory, "free_bytes", lambda _device: count)


def settings(**values):
    return PoolSettings(**{"block_size": BLOCK_SIZE, "memory_fraction": 0.5, **values})


def test_adapters_get_their_share_before_the_pool_does(monkeypatch):
    free(monkeypatch, 200 * BLOCK_BYTES)
    plan = size_pool(ToyModel(), settings(adapter_fraction=0.25), SPEC, step)
    assert plan.adapter_bytes == dict(plan.items)["adapters"]
    assert plan.adapter_bytes <= 50 * BLOCK_BYTES
    left = 200 * BLOCK_BYTES - dict(plan.items)["activations"] - plan.adapter_bytes
    assert plan.num_blocks == left // 2 // BLOCK_BYTES


def test_the_pool_takes_its_share_of_what_the_largest_step_leaves(monkeypatch):
    free(monkeypatch, ACTIVATIONS + 200 * BLOCK_BYTES)
    model = ToyModel()
    plan = size_pool(model, settings(), SPEC, step)
    assert plan.num_blocks == 100
    assert dict(plan.items) == {
        "weights": 1000,
        "activations": ACTIVATIONS,
        "graphs": 0,
        "adapters": 0,
        "kv_cache": 100 * BLOCK_BYTES,
        "unused": 100 * BLOCK_BYTES,
    }


def test_what_never_fits_is_refused_before_anything_is_allocated(monkeypatch):
    free(monkeypatch, 19 * BLOCK_BYTES)

    def unreachable():
        raise AssertionError("the step ran")

    with pytest.raises(StartupError, match=r"10 blocks .* lower --max-total-tokens to 36"):
        size_pool(ToyModel(), settings(), SPEC, unreachable)


def test_a_pool_of_before_does_not_count_as_taken(monkeypatch):
    model = ToyModel()
    model.allocate_cache(100, BLOCK_SIZE)
    monkeypatch.setattr(
        device_memory, "free_bytes", lambda _device: 0 if model._cache is not None else 10**6
    )
    assert size_pool(model, settings(), SPEC, step).num_blocks > 0


def test_the_callers_limit_holds(monkeypatch):
    free(monkeypatch, 10**9)
    limited = WarmupSpec(
        max_input_length=32, max_total_tokens=40, max_step_tokens=16, max_rows=5, max_blocks=7
    )
    assert size_pool(ToyModel(), settings(), limited, step).num_blocks == 7


def test_a_fixed_number_of_blocks_is_taken_if_it_fits(monkeypatch):
    free(monkeypatch, ACTIVATIONS + 20 * BLOCK_BYTES)
    assert size_pool(ToyModel(), settings(num_blocks=3), SPEC, step).num_blocks == 3
    with pytest.raises(StartupError, match="21 blocks") as caught:
        size_pool(ToyModel(), settings(num_blocks=21), SPEC, step)
    assert caught.value.exit_code is ExitCode.OUT_OF_MEMORY


def test_too_little_for_one_longest_request_is_said_in_words(monkeypatch):
    free(monkeypatch, ACTIVATIONS + 19 * BLOCK_BYTES)
    with pytest.raises(StartupError, match="lower --max-total-tokens") as caught:
        size_pool(ToyModel(), settings(), SPEC, step)
    assert caught.value.exit_code is ExitCode.OUT_OF_MEMORY


def test_only_the_required_length_must_fit(monkeypatch):
    free(monkeypatch, ACTIVATIONS + 8 * BLOCK_BYTES)
    required = replace(SPEC, required_tokens=4 * BLOCK_SIZE)
    assert size_pool(ToyModel(), settings(), required, step).num_blocks == 4
    more = replace(SPEC, required_tokens=4 * BLOCK_SIZE + 1)
    with pytest.raises(StartupError, match="needs 5 blocks"):
        size_pool(ToyModel(), settings(), more, step)


def test_a_step_that_does_not_fit_is_said_in_words():
    def step_without_memory():
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory")

    with pytest.raises(StartupError, match="16 tokens in 5 rows"):
        size_pool(ToyModel(), settings(), SPEC, step_without_memory)


def test_other_failures_of_the_largest_step_are_not_called_memory():
    def broken():
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        size_pool(ToyModel(), settings(), SPEC, broken)


def test_peaks_between_start_and_end_are_seen():
    size = 64 * 2**20

    def spike():
        # Memory of its own: an allocator would hand out what it kept of others, and nothing grows.
        with mmap.mmap(-1, size) as block:
            block[:: mmap.PAGESIZE] = bytes(size // mmap.PAGESIZE)
            # As long as it takes whoever samples to have a turn, however busy the machine is.
            time.sleep(0.4)

    # What others left behind would go meanwhile, and make up for it.
    gc.collect()
    cpu = torch.device("cpu")
    assert device_memory.measure_peak(cpu, spike) > size // 2
    assert 0 < device_memory.free_bytes(cpu) <= device_memory.total_bytes(cpu)
