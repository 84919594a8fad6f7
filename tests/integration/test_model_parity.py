"""Tiny models of the promised families, paged, against stock transformers.

Each schedule is also run with faults planted, to show that the comparison finds them.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.helpers.paged_runner import (
    Fault,
    LogitsDifferError,
    PagedRunner,
    check_logits,
    stock_logits,
)
from tests.helpers.schedules import LENGTHS, SCHEDULES, chunked, preempted
from tests.helpers.tiny_models import VOCAB_SIZE, make_tiny_model

from lorax_contract.config import ShardConfig
from lorax_shard.attention import registry
from lorax_shard.linear.backends import OneDnnBackend
from lorax_shard.linear.registry import BACKENDS as LINEARS
from lorax_shard.model.hf_model import HFPagedModel
from lorax_shard.model.loader import load_paged_model

# These see every schedule, backend and fault; test_families has all tested families.
FAMILIES = ("llama", "mistral", "qwen2", "gemma2", "gpt2")
WINDOWED = ("mistral", "gemma2")


class Tiny:
    """One tiny model: its folder, rows of token ids, and what transformers makes of them."""

    def __init__(self, family: str, path: Path) -> None:
        self.path = make_tiny_model(family, path)
        draw = random.Random(3)
        self.rows = [[draw.randrange(VOCAB_SIZE) for _ in range(n)] for n in LENGTHS]
        self.stock = stock_logits(self.path, self.rows)

    def load(self, backend: str, linears: str = "auto") -> HFPagedModel:
        config = ShardConfig(
            model_dir=str(self.path),
            model_id="tiny",
            shard_uris=["unix:///unused"],
            attention_backend=backend,
            linear_backend=linears,
        )
        return load_paged_model(config)


@pytest.fixture(scope="module", params=FAMILIES)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(request.param, tmp_path_factory.mktemp(request.param))


# In Triton's interpreter this takes minutes; the contract suite compares it there as well.
@pytest.fixture(scope="module", params=sorted({*registry.BACKENDS.names} - {"triton", "flash"}))
def model(request: pytest.FixtureRequest, tiny: Tiny) -> HFPagedModel:
    if reason := registry.BACKENDS.probe(request.param, torch.device("cpu"), torch.float32):
        pytest.skip(f"{request.param}: {reason}")
    return tiny.load(request.param)


def run(
    model: HFPagedModel, tiny: Tiny, schedule: Callable[[PagedRunner], None], fault: Fault
) -> None:
    runner = PagedRunner(model, tiny.rows, num_blocks=64, fault=fault)
    schedule(runner)
    check_logits(runner, tiny.stock)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_logits_equal_stock_transformers(
    model: HFPagedModel, tiny: Tiny, schedule: Callable[[PagedRunner], None]
) -> None:
    run(model, tiny, schedule, Fault.NONE)


@pytest.mark.parametrize("schedule", [chunked, preempted])
@pytest.mark.parametrize("fault", [Fault.LOST_BLOCK, Fault.POSITION_OFF_BY_ONE])
def test_planted_fault_is_found(
    model: HFPagedModel, tiny: Tiny, schedule: Callable[[PagedRunner], None], fault: Fault
) -> None:
    with pytest.raises(LogitsDifferError):
        run(model, tiny, schedule, fault)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ignored_window_is_found(
    model: HFPagedModel, tiny: Tiny, schedule: Callable[[PagedRunner], None]
) -> None:
    if model.model_type not in WINDOWED:
        run(model, tiny, schedule, Fault.WINDOW_IGNORED)  # there is none to ignore
        return
    with pytest.raises(LogitsDifferError):
        run(model, tiny, schedule, Fault.WINDOW_IGNORED)


def test_outputs_vary(tiny: Tiny) -> None:
    choices = {int(token) for logits in tiny.stock for token in logits.argmax(-1)}
    assert len(choices) > 20


def test_only_asked_logits_are_returned(model: HFPagedModel, tiny: Tiny) -> None:
    ids = torch.tensor(tiny.rows[0])
    model.allocate_cache(16, 4)
    metadata = model.make_metadata([37], [37], torch.arange(37), torch.arange(10)[None], 0)
    asked = torch.tensor([36, 3])
    logits = model.forward(ids, torch.arange(37), metadata, asked)
    scale = float(tiny.stock[0].abs().max())
    assert float((logits - tiny.stock[0][asked]).abs().max()) <= 1e-4 * scale
    assert model.forward(ids, torch.arange(37), metadata, asked[:0]).shape == (0, VOCAB_SIZE)


def test_copied_blocks_serve_another_row(model: HFPagedModel, tiny: Tiny) -> None:
    model.allocate_cache(32, 4)
    ids = torch.tensor(tiny.rows[0])
    metadata = model.make_metadata([36], [36], torch.arange(36), torch.arange(9)[None], 0)
    model.forward(ids[:36], torch.arange(36), metadata, torch.tensor([35]))
    model.copy_blocks(list(range(9)), list(range(20, 29)))
    table = torch.tensor([[*range(20, 29), 30]])
    metadata = model.make_metadata([1], [37], torch.tensor([120]), table, 1)
    logits = model.forward(ids[36:], torch.tensor([36]), metadata, torch.tensor([0]))
    scale = float(tiny.stock[0].abs().max())
    assert float((logits[0] - tiny.stock[0][36]).abs().max()) <= 1e-4 * scale


def packed_linears() -> str:
    """Return a backend that stacks linears of one input, whose outputs are columns of one tensor."""
    cpu = torch.device("cpu")
    return "onednn" if OneDnnBackend.probe(cpu, torch.float32) is None else "auto"


def test_logits_stay_equal_with_stacked_linears(tiny: Tiny) -> None:
    model = tiny.load("auto", packed_linears())
    for schedule in SCHEDULES:
        run(model, tiny, schedule, Fault.NONE)


def test_numbers_are_the_same_to_the_last_bit_in_any_schedule(tiny: Tiny) -> None:
    """With kernels of our own, of which none adds up otherwise for other rows beside it."""
    cpu = torch.device("cpu")
    for backends, name in ((registry.BACKENDS, "cpp"), (LINEARS, "panel")):
        if reason := backends.probe(name, cpu, torch.float32):
            pytest.skip(f"{name}: {reason}")
    model, found = tiny.load("cpp", "panel"), []
    for schedule in SCHEDULES:
        runner = PagedRunner(model, tiny.rows, num_blocks=64)
        schedule(runner)
        found.append([torch.stack([row[at] for at in sorted(row)]) for row in runner.logits])
    for row, whole in enumerate(found[0]):
        assert all(torch.equal(other[row], whole) for other in found[1:])
