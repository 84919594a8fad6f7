"""How a device's memory is divided, by numbers as GPUs have them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_contract.step import WarmupSpec
from lorax_shard.engine.memory_plan import (
    MeasuredMemory,
    PoolSettings,
    plan_memory,
    remedies,
)

GIB = 2**30
# An 8B model of 32 layers in bfloat16: 8 KV heads of 128, 16 tokens a block.
BLOCK_BYTES = 32 * 2 * 8 * 128 * 2 * 16
SPEC = WarmupSpec(max_input_length=4095, max_total_tokens=4096, max_step_tokens=2048, max_rows=256)
SETTINGS = PoolSettings(block_size=16, memory_fraction=0.9, adapter_fraction=0.1)
# A GPU of 80 GB with the weights loaded, which nobody else uses.
ALONE = MeasuredMemory(
    total=80 * GIB, free=64 * GIB, taken=15 * GIB, weights=15 * GIB, activations=4 * GIB
)


def items(measured=ALONE, settings=SETTINGS, spec=SPEC):
    return dict(plan_memory(measured, settings, spec, BLOCK_BYTES).items)


def test_nothing_is_counted_twice():
    found = items()
    assert sum(found.values()) == ALONE.weights + ALONE.free
    assert found["adapters"] == 6 * GIB
    # 0.9 of the 54 GiB that step and adapters leave.
    assert found["kv_cache"] == pytest.approx(48.6 * GIB, rel=1e-4)
    assert found["kv_cache"] % BLOCK_BYTES == 0


def test_half_the_device_is_half_of_all_of_it_weights_included():
    found = items(settings=replace(SETTINGS, device_fraction=0.5))
    assert sum(found.values()) == 40 * GIB


def test_two_servers_with_half_of_a_device_each_fit_side_by_side():
    half = replace(SETTINGS, device_fraction=0.5)
    first = items(settings=half)
    # The second one finds the first one's weights, cache and adapters taken.
    beside = replace(ALONE, free=ALONE.free - sum(first.values()))
    second = items(beside, half)
    assert sum(second.values()) <= 40 * GIB
    assert sum(second.values()) > 38 * GIB


def test_a_cap_above_what_is_free_changes_nothing():
    crowded = replace(ALONE, free=20 * GIB)
    assert items(crowded) == items(crowded, replace(SETTINGS, device_fraction=0.95))


def test_ranks_on_one_device_share_what_is_free_and_the_cap():
    two = replace(SETTINGS, ranks_on_device=2)
    # Both ranks have loaded: the device lacks the weights of both.
    rank = MeasuredMemory(
        total=80 * GIB, free=63 * GIB, taken=8 * GIB, weights=8 * GIB, activations=3 * GIB
    )
    assert 2 * sum(items(rank, two).values()) == 79 * GIB
    capped = replace(two, device_fraction=0.5)
    assert 2 * sum(items(rank, capped).values()) == 40 * GIB


def test_graphs_are_kept_free():
    assert items()["kv_cache"] > items(replace(ALONE, graphs=2 * GIB))["kv_cache"]
    assert items(replace(ALONE, graphs=2 * GIB))["graphs"] == 2 * GIB


def test_a_rank_that_could_hold_more_blocks_than_the_others_leaves_them_unused():
    plan = plan_memory(ALONE, SETTINGS, SPEC, BLOCK_BYTES)
    fewer = plan.with_blocks(plan.num_blocks - 100)
    before, after = dict(plan.items), dict(fewer.items)
    assert fewer.num_blocks == plan.num_blocks - 100
    assert after["kv_cache"] == fewer.num_blocks * BLOCK_BYTES
    assert after["unused"] - before["unused"] == 100 * BLOCK_BYTES
    assert sum(after.values()) == sum(before.values())


def test_a_refusal_says_what_is_lacking_and_what_would_do():
    full = replace(ALONE, free=4 * GIB + 1000 * BLOCK_BYTES)
    long = replace(SPEC, max_total_tokens=16384)
    with pytest.raises(StartupError) as caught:
        items(full, spec=long)
    assert caught.value.exit_code is ExitCode.OUT_OF_MEMORY
    words = str(caught.value)
    assert "needs 1024 blocks" in words
    assert "beside its weights less 4096.0 MiB for the largest step" in words
    assert "lower --max-total-tokens to 12960" in words
    assert "about" in words


def test_a_capped_refusal_names_the_cap():
    tight = replace(SETTINGS, device_fraction=0.24)
    with pytest.raises(StartupError, match="raise --cuda-memory-fraction to 0.25"):
        items(settings=tight)


def test_what_no_flag_helps_asks_for_another_model():
    with pytest.raises(StartupError, match="choose a smaller model or a smaller dtype") as caught:
        items(replace(ALONE, free=0, activations=0))
    assert "step" not in str(caught.value)


@given(
    free=st.integers(0, 64 * GIB),
    activations=st.integers(0, 8 * GIB),
    tokens=st.integers(2, 2**20),
    kv=st.floats(0.01, 1.0),
    adapters=st.floats(0.0, 0.99),
    device=st.floats(0.01, 1.0),
    ranks=st.integers(1, 4),
    num_blocks=st.none() | st.integers(1, 40_000),
)
def test_each_remedy_is_enough_alone(
    free, activations, tokens, kv, adapters, device, ranks, num_blocks
):
    measured = replace(ALONE, free=free, activations=activations)
    settings = replace(
        SETTINGS, memory_fraction=kv, adapter_fraction=adapters, device_fraction=device,
        ranks_on_device=ranks, num_blocks=num_blocks,
    )  # fmt: skip
    spec = replace(SPEC, max_total_tokens=tokens)
    try:
        plan = plan_memory(measured, settings, spec, BLOCK_BYTES)
    except StartupError:
        pass
    else:
        found = dict(plan.items)
        assert min(found.values()) >= 0
        assert sum(found.values()) - found["weights"] <= free // ranks
        if num_blocks is None:
            assert plan.num_blocks * 16 >= tokens
        return
    for _verb, flag, value in remedies(measured, settings, spec, BLOCK_BYTES):
        changes = {
            "--kv-memory-fraction": lambda v: {"memory_fraction": float(v)},
            "--adapter-memory-fraction": lambda v: {"adapter_fraction": float(v)},
            "--cuda-memory-fraction": lambda v: {"device_fraction": float(v)},
            "--num-blocks": lambda v: {"num_blocks": int(v)},
        }
        changed = spec
        if flag == "--max-total-tokens":
            changed = replace(spec, max_total_tokens=int(value))
        elif flag == "--max-batch-prefill-tokens":
            continue  # what a smaller step takes is not known before it has run
        own = changes.get(flag, lambda _v: {})(value)
        assert plan_memory(measured, replace(settings, **own), changed, BLOCK_BYTES).num_blocks
