"""What a launch asks of a device: as much for many rows as for few, and nothing that waits for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bench.launches import KINDS, make_engine, plans
from tests.helpers import toy_paged_model as toy
from torch.utils._python_dispatch import TorchDispatchMode

from lorax_contract.step import FinishCode
from lorax_shard.engine.self_test import DeviceBrokenError
from lorax_shard.sampling.batched import draw_batch
from lorax_shard.sampling.device_tokens import DeviceTokens
from lorax_shard.sampling.sampler import Sampler

# What a host waits in, if the tensor lies on a device.
WAITS = ("tolist", "item", "cpu", "numpy", "__bool__", "__float__", "__int__", "nonzero")


class Operations(TorchDispatchMode):
    """Counts what is launched."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def engine_on_device(num_rows: int):
    """Return an engine that draws as on a device, so that ids are read late."""
    engine = make_engine(num_rows, 12)
    engine.computation.sampler = Sampler(engine.model.vocab_size, method=draw_batch)
    return engine


@pytest.fixture
def waits(monkeypatch):
    """Names, in order, what a host would wait in."""
    noted: list[str] = []
    for name in WAITS:
        own = getattr(torch.Tensor, name)

        def noting(self, *args, _own=own, _name=name, **kwargs):
            noted.append(_name)
            return _own(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, noting)
    return noted


@pytest.mark.parametrize("kind", ["greedy", "top-p"])
def test_a_launch_waits_for_nothing_until_the_next_pass_is_on_its_way(waits, kind):
    engine = engine_on_device(6)
    forward = engine.model.forward
    engine.model.forward = lambda *given: (waits.append("forward"), forward(*given))[1]
    launched = []
    for plan in plans(6, 6, KINDS[kind]):
        waits.clear()
        launched.append(engine.launch(plan))
        # The ids of the step before, once this one's pass and draws are launched.
        assert waits == ["forward"] + ["tolist"] * (len(launched) > 1)
    waits.clear()
    outcomes = [engine.collect(each) for each in launched]
    # All but those of the last one were read.
    assert waits == ["tolist"]
    assert all(outcome.num_tokens == [1] * 6 for outcome in outcomes)


@pytest.mark.parametrize("kind", ["greedy", "top-p"])
def test_what_is_launched_does_not_grow_with_the_rows(kind):
    counts = {}
    for num_rows in (2, 64):
        engine = engine_on_device(num_rows)
        for plan in plans(num_rows, 6, KINDS[kind]):
            with Operations() as operations:
                launched = engine.launch(plan)
            engine.collect(launched)
        counts[num_rows] = operations.names
    assert counts[2] == counts[64]
    # Inputs, steps on the host included, and draws; a pass is a model's own.
    assert len(counts[64]) < 320


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here: see tests/gpu")
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_steps_take_what_triton_s_kernels_draw_where_it_lies(kind):
    """In its interpreter; and the tokens are those that a CPU draws."""
    draws = pytest.importorskip("lorax_shard.sampling.triton.backend").TritonDraws(256, 64)
    found = []
    for method in (draws, None):
        engine = make_engine(2, 12)
        if method is not None:
            engine.computation.sampler = Sampler(engine.model.vocab_size, method=method)
        launched = [engine.launch(plan) for plan in plans(2, 4, KINDS[kind])]
        found.append([engine.collect(each).tokens.ids for each in launched])
    assert found[0] == found[1]


def test_penalties_wait_for_the_ids_that_they_count(waits):
    engine = engine_on_device(3)
    forward = engine.model.forward
    engine.model.forward = lambda *given: (waits.append("forward"), forward(*given))[1]
    for number, plan in enumerate(plans(3, 4, KINDS["penalties"])):
        waits.clear()
        engine.launch(plan)
        assert waits == (["tolist"] if number else []) + ["forward"]


def test_a_row_that_turns_out_to_have_drawn_nothing_writes_to_nobodys_blocks():
    """Its end is known when ids are read for a neighbour's penalties: after the step was laid out."""
    engine = toy.make_engine()
    engine.computation.sampler = Sampler(engine.model.vocab_size, method=draw_batch)
    first = [toy.new_row(1, [7, 9, 11]), toy.new_row(2, [7, toy.NAN_ID])]
    other = toy.new_row(3, [40, 41, 42], repetition_penalty=1.2)
    launched = [
        engine.launch(
            toy.make_plan(1, [(1, 3, [0, 5]), (2, 2, [2]), (3, 3, [3, 4])], new=[*first, other])
        )
    ]
    for seq in (2, 3):
        launched.append(engine.launch(toy.make_plan(seq, [(1, 1, []), (2, 1, []), (3, 1, [])])))
    outcomes = [engine.collect(each) for each in launched]
    ids = [toy.tokens_of(outcome, 1)[0] for outcome in outcomes]
    assert [each for some in ids for each in some] == toy.expected_tokens([7, 9, 11], 3)
    assert toy.tokens_of(outcomes[0], 2) == ([], FinishCode.ERROR)
    assert [outcome.row_ids for outcome in outcomes[1:]] == [[1, 3], [1, 3]]


def test_a_device_that_fails_behind_a_launch_is_broken_for_both_halves(monkeypatch):
    engine = toy.make_engine()
    engine.computation.sampler = Sampler(engine.model.vocab_size, method=draw_batch)
    launched = engine.launch(toy.make_plan(1, [(1, 3, [5])], new=[toy.new_row(1, [7, 9, 11])]))

    def fail(_self):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(DeviceTokens, "read", fail)
    with pytest.raises(DeviceBrokenError, match="illegal memory access"):
        engine.collect(launched)
    with pytest.raises(DeviceBrokenError, match="illegal memory access"):
        engine.launch(toy.make_plan(2, [(1, 1, [])]))
