"""Backends over a cache of a byte a number: exact on what is stored, and how far that is off.

The oracle attends in float64 over K and V as the cache rounds them, so the tolerances are those
of the computation's dtype, not fp8's.
"""

from __future__ import annotations

import pytest
import torch
from tests.helpers.paged_sequences import DEVICE, Sequences

from lorax_shard.attention import registry
from lorax_shard.attention.backend import AttentionBackend, AttentionSpec
from lorax_shard.attention.kv_cache import FP8

SCALE = 16**-0.5
SPECS = {
    "plain": AttentionSpec(SCALE),
    "window": AttentionSpec(SCALE, window=5),
    "everything": AttentionSpec(
        0.4, window=6, softcap=3.0, sinks=torch.linspace(2.0, -1.0, 6, device=DEVICE)
    ),
}


@pytest.fixture(params=["torch", "sdpa", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> AttentionBackend:
    if reason := registry.BACKENDS.probe(request.param, DEVICE, torch.float32):
        pytest.skip(f"{request.param}: {reason}")
    backend = registry.create(request.param, DEVICE, torch.float32)
    if reason := backend.refuses_cache(FP8, DEVICE):
        pytest.skip(f"{request.param}: {reason}")
    if request.param == "triton" and DEVICE.type == "cpu":
        # Triton's interpreter rounds 1.97 to 1 instead of 2: its carry does not reach the exponent.
        monkeypatch.setattr(type(backend), "store", AttentionBackend.store)
    return backend


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_chunks_and_decodes(
    backend: AttentionBackend, spec: AttentionSpec, dtype: torch.dtype
) -> None:
    if reason := registry.BACKENDS.probe(backend.name, DEVICE, dtype):
        pytest.skip(f"{backend.name}: {reason}")
    sequences = Sequences([23, 9, 30, 16, 7], dtype=dtype, device=DEVICE, kv_dtype=FP8)
    sequences.check(backend, spec, {0: 6, 1: 8, 2: 11})
    sequences.check(backend, spec, {1: 1, 0: 5, 2: 1, 3: 15})
    sequences.check(backend, spec, {0: 12, 2: 17, 3: 1, 4: 1})


def test_rounding_stays_within_the_format(backend: AttentionBackend) -> None:
    """Three bits of mantissa: a sixteenth of each number; averages of V are off by no more."""
    narrow = Sequences([40], device=DEVICE, kv_dtype=FP8)
    wide = Sequences([40], device=DEVICE)
    spec = SPECS["plain"]
    # Only V counts where all keys are alike.
    for each in (narrow, wide):
        each.keys[0].zero_()
    answers = [each.step(backend, spec, {0: 40})[0] for each in (narrow, wide)]
    difference = (answers[0] - answers[1]).abs().max()
    assert 0 < difference <= wide.values[0].abs().max() / 16


def test_backends_that_read_the_cache_themselves_say_so() -> None:
    classes = {name: registry.BACKENDS.load(name) for name in registry.BACKENDS.names}
    reading = {name for name, each in classes.items() if each.refuses_cache(FP8, DEVICE) is None}
    assert reading == {"torch", "sdpa", "triton"}
