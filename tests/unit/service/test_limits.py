"""RequestLimits: what the configuration leaves open, bounded by model and memory."""

from __future__ import annotations

import pytest

from lorax_contract.config import ConfigError
from lorax_router.service.limits import (
    Lengths,
    lengths_in_pool,
    lengths_of_model,
    required_length,
)


@pytest.mark.parametrize(
    ("length", "total", "positions", "expected"),
    [
        (None, None, 8192, Lengths(4095, 4096)),
        (None, None, 2048, Lengths(2047, 2048)),
        (None, None, 0, Lengths(4095, 4096)),
        (None, 8000, 8192, Lengths(7999, 8000)),
        (100, None, 8192, Lengths(100, 4096)),
        (6000, None, 8192, Lengths(6000, 6001)),
        (100, 200, 8192, Lengths(100, 200)),
    ],
)
def test_lengths_of_model(length, total, positions, expected):
    assert lengths_of_model(length, total, positions) == expected


@pytest.mark.parametrize(
    ("length", "total", "positions", "named"),
    [
        (None, 9000, 8192, "max_total_tokens: 9000"),
        (200, 200, 8192, "max_input_length: 200"),
        (8192, None, 8192, "max_input_length: 8192"),
        (0, 200, 8192, "max_input_length"),
    ],
)
def test_a_length_that_cannot_be_served_is_refused_by_name(length, total, positions, named):
    with pytest.raises(ConfigError, match=named):
        lengths_of_model(length, total, positions)


def test_defaults_shrink_to_the_pool():
    lengths = lengths_of_model(None, None, 8192)
    assert lengths_in_pool(lengths, None, None, pool_tokens=640) == Lengths(639, 640)
    assert lengths_in_pool(lengths, None, None, pool_tokens=9999) == lengths


def test_an_input_length_that_was_asked_for_survives_the_shrinking_if_it_fits():
    lengths = lengths_of_model(100, None, 8192)
    assert lengths_in_pool(lengths, 100, None, pool_tokens=640) == Lengths(100, 640)
    with pytest.raises(ConfigError, match="max_input_length: 100"):
        lengths_in_pool(lengths, 100, None, pool_tokens=64)


def test_w6_a_total_that_could_never_be_allocated_is_refused_at_start():
    """LoRAX accepts it, and the first such request blocks the queue for ever."""
    lengths = lengths_of_model(None, 4096, 8192)
    with pytest.raises(ConfigError, match="4096 does not fit the KV cache of 4095 tokens"):
        lengths_in_pool(lengths, None, 4096, pool_tokens=4095)
    assert lengths_in_pool(lengths, None, 4096, pool_tokens=4096) == lengths


def test_a_pool_too_small_for_anything_is_refused():
    with pytest.raises(ConfigError, match="too little"):
        lengths_in_pool(Lengths(4095, 4096), None, None, pool_tokens=1)


@pytest.mark.parametrize(
    ("length", "total", "expected"), [(None, None, 2), (100, None, 101), (100, 4096, 4096)]
)
def test_only_lengths_that_were_asked_for_must_fit_the_pool(length, total, expected):
    assert required_length(length, total) == expected
    lengths = lengths_of_model(length, total, 8192)
    in_pool = lengths_in_pool(lengths, length, total, pool_tokens=expected)
    assert in_pool.max_total_tokens == expected
    if total is not None or length is not None:
        with pytest.raises(ConfigError):
            lengths_in_pool(lengths, length, total, pool_tokens=expected - 1)
