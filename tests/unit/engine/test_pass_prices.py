"""What passes take, by their positions: measured by one rank for all, and read between the sizes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.helpers.toy_paged_model import ToyModel

from lorax_contract.step import WarmupSpec
from lorax_shard.engine.pass_prices import PassPrices, PassTimer
from lorax_shard.sampling.batched import draw_batch
from lorax_shard.sampling.device_tokens import DeviceTokens
from lorax_shard.sampling.sampled import SampledTokens
from lorax_shard.sampling.sampler import Sampler

# Positions cost nothing up to four, then a quarter of a pass each; a draft costs by itself.
PRICES = PassPrices(sizes=(1, 4, 8), single_s=(1.0, 1.0, 2.0), drafted_s=(1.5, 1.5, 2.5))


def added(num_positions: int, *num_drafted: int) -> list[float]:
    return PRICES.added_s(num_positions, np.array(num_drafted)).tolist()


def test_what_drafts_add_depends_on_what_is_in_the_step() -> None:
    assert added(1, 0, 1, 3, 7) == pytest.approx([0.0, 0.5, 0.5, 1.5])
    assert added(8, 0, 4) == pytest.approx([0.0, 1.5])


def test_beyond_the_largest_size_it_goes_on_as_before() -> None:
    assert added(16, 8) == pytest.approx([2.5])


def test_a_pass_never_seems_longer_than_a_larger_one() -> None:
    """What was measured may be disturbed, which makes it longer."""
    noisy = PassPrices(sizes=(1, 4, 8), single_s=(1.0, 3.0, 2.0), drafted_s=(9.0, 5.0, 2.0))
    assert noisy.added_s(1, np.array([1, 3, 7])).tolist() == [1.0, 1.0, 1.0]
    assert noisy.spared_s(4) < 0.5


def test_a_row_alone_spares_whole_steps_and_one_of_many_less() -> None:
    assert PRICES.spared_s(1) == 1.0
    # Of four rows each adds nothing, and a quarter of the step is its part.
    assert 0.0 < PRICES.spared_s(4) < 0.25
    # Of eight each adds a quarter of a second.
    assert PRICES.spared_s(8) == pytest.approx(0.25)


class Rank:
    """A rank of several, which is told rank 0's numbers."""

    rank, world_size = 1, 2

    def __init__(self) -> None:
        self.given: list[torch.Tensor] = []

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        self.given.append(tensor)
        return torch.arange(1, len(tensor) + 1, dtype=tensor.dtype) * 1_000_000


def warm_model() -> ToyModel:
    model = ToyModel()
    model.allocate_cache(16, 4)
    return model


SPEC = WarmupSpec(max_input_length=32, max_total_tokens=48, max_step_tokens=40, max_rows=8)


def test_passes_of_single_tokens_and_of_drafts_are_measured() -> None:
    model = warm_model()
    timer = PassTimer(
        model, Sampler(model.vocab_size, model.device), None, num_blocks=16, block_size=4
    )
    prices = timer.measure(SPEC, max_draft=3)
    assert prices.sizes == (1, 4, 8)
    assert min(*prices.single_s, *prices.drafted_s) > 0
    shapes = [tuple(lens) for lens in model.passes]
    assert set(shapes) == {(1,), (1,) * 4, (1,) * 8, (4,), (4, 4)}


def test_a_pass_is_over_when_what_a_device_drew_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    model, read = warm_model(), DeviceTokens.read
    num_read: list[int] = []

    def noted(tokens: DeviceTokens) -> SampledTokens:
        num_read.append(len(model.passes))
        return read(tokens)

    monkeypatch.setattr(DeviceTokens, "read", noted)
    sampler = Sampler(model.vocab_size, model.device, method=draw_batch)
    PassTimer(model, sampler, None, num_blocks=16, block_size=4).measure(SPEC, max_draft=3)
    assert num_read == list(range(1, len(model.passes) + 1))


def test_the_clock_of_the_first_rank_counts_on_all() -> None:
    model, group = warm_model(), Rank()
    timer = PassTimer(model, None, group, num_blocks=16, block_size=4)
    prices = timer.measure(SPEC, max_draft=3)
    # How long it took so far, each time, and what each pass took at best.
    assert [len(each) for each in group.given] == [1] * 8 + [6]
    assert prices.single_s == (0.001, 0.002, 0.003)
    assert prices.drafted_s == (0.004, 0.005, 0.006)


@pytest.mark.parametrize(("num_blocks", "max_total_tokens"), [(1, 48), (16, 2)])
def test_short_sequences_and_small_pools_are_measured_too(num_blocks, max_total_tokens) -> None:
    model = warm_model()
    timer = PassTimer(model, None, None, num_blocks=num_blocks, block_size=4)
    spec = WarmupSpec(
        max_input_length=1, max_total_tokens=max_total_tokens, max_step_tokens=1, max_rows=1
    )
    assert timer.measure(spec, max_draft=8).sizes == (1,)
