"""install() replaces a model's linears and changes nothing but rounding."""

from __future__ import annotations

import gc
import logging
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_shard.linear import PackedLinear, install
from lorax_shard.linear.backends import CompositeBackend, OneDnnBackend, TorchBackend
from lorax_shard.linear.measure import LIMITS, ROWS, choose, measure
from lorax_shard.linear.packed import SiblingGroup, SiblingKernel
from lorax_shard.linear.registry import BACKENDS

CPU = torch.device("cpu")


class Conv1D(nn.Module):
    """A linear with the layout of GPT-2: weight in x out."""

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__()
        self.nf, self.nx = out_features, in_features
        self.weight = nn.Parameter(torch.randn(in_features, out_features))
        self.bias = nn.Parameter(torch.randn(out_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + self.bias


class Block(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(hidden, hidden)
        self.k_proj = nn.Linear(hidden, hidden // 2, bias=False)
        self.v_proj = nn.Linear(hidden, hidden // 2)
        self.mix = Conv1D(hidden, hidden * 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = [self.q_proj(x), self.k_proj(x), self.v_proj(x)]
        return torch.tanh(self.mix(torch.cat(parts, dim=-1)))


class Model(nn.Module):
    """A head tied to the embedding over two blocks."""

    def __init__(self, vocabulary: int = 40, hidden: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, hidden)
        self.blocks = nn.Sequential(Block(hidden), Block(hidden))
        self.lm_head = nn.Linear(hidden, vocabulary, bias=False)
        self.lm_head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.blocks(self.embedding(ids)))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what is measured here out of the user's cache."""
    monkeypatch.setenv("LORAX_CACHE", str(tmp_path))


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model().eval()


def skip_unless_it_runs(backend: str) -> None:
    if backend != "auto" and (reason := BACKENDS.probe(backend, CPU, torch.float32)) is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("stack", [True, False])
@pytest.mark.parametrize("backend", ["torch", "panel", "tiles", "onednn", "mkl", "auto"])
@torch.inference_mode()
def test_outputs_stay_equal(model: Model, backend: str, stack: bool) -> None:
    skip_unless_it_runs(backend)
    batches = [torch.randint(0, 40, (rows,)) for rows in (1, 3, 33, 70)]
    expected = [model(ids) for ids in batches]
    install(model, backend, CPU, stack_siblings=stack)
    for ids, logits in zip(batches, expected, strict=True):
        torch.testing.assert_close(model(ids), logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model(ids), logits, rtol=1e-5, atol=1e-5)


def test_replaces_every_linear_and_keeps_their_facts(model: Model) -> None:
    weight = model.blocks[0].k_proj.weight.detach().clone()
    mixed = model.blocks[0].mix.weight.detach().clone()
    assert install(model, "onednn", CPU).backend == "onednn"
    kinds = {type(each) for each in model.modules()}
    assert nn.Linear not in kinds
    assert Conv1D not in kinds
    packed = model.blocks[0].k_proj
    assert isinstance(packed, PackedLinear)
    assert (packed.in_features, packed.out_features, packed.bias) == (16, 8, None)
    assert torch.equal(packed.weight, weight)
    assert torch.equal(model.blocks[0].mix.weight, mixed.t())


def test_packing_frees_the_plain_weights(model: Model) -> None:
    plain = weakref.ref(model.blocks[0].q_proj.weight)
    tied = weakref.ref(model.embedding.weight)
    install(model, "onednn", CPU)
    gc.collect()
    assert plain() is None
    assert tied() is model.embedding.weight


@pytest.mark.parametrize("backend", ["torch", "panel", "tiles", "onednn"])
def test_tied_embedding_stays_as_it_is(model: Model, backend: str) -> None:
    skip_unless_it_runs(backend)
    before = model.embedding.weight
    values = before.detach().clone()
    install(model, backend, CPU)
    assert model.embedding.weight is before
    assert torch.equal(model.lm_head.weight, values)


@pytest.mark.parametrize(("backend", "copies"), [("torch", 0), ("onednn", 1), ("mkl", None)])
def test_second_copies_of_weights_are_counted(
    model: Model, backend: str, copies: int | None
) -> None:
    head_bytes = model.lm_head.weight.nbytes
    plain_bytes = sum(
        each.weight.nbytes for each in model.modules() if isinstance(each, nn.Linear | Conv1D)
    )
    copied = install(model, backend, CPU).copied_bytes
    if copies is None:  # every weight twice; MKL rounds sizes up
        assert copied >= plain_bytes
    else:
        assert copied == copies * head_bytes


def test_a_tied_head_is_packed_only_if_memory_allows(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorax_shard.linear.replace._fits", lambda nbytes: False)
    install(model, "onednn", CPU)
    head = model.lm_head.weight
    assert head.data_ptr() == model.embedding.weight.data_ptr()


def test_subclasses_of_linear_are_left_alone() -> None:
    class Special(nn.Linear):
        pass

    model = nn.Sequential(Special(4, 4), nn.Linear(4, 4))
    install(model, "torch", CPU)
    assert type(model[0]) is Special
    assert type(model[1]) is PackedLinear


def test_a_backend_that_cannot_run_is_refused_in_words(model: Model) -> None:
    with pytest.raises(StartupError, match="float64") as refused:
        install(model.double(), "onednn", CPU)
    assert refused.value.exit_code is ExitCode.BACKEND_UNAVAILABLE
    with pytest.raises(StartupError, match="auto or one of torch, panel, tiles, onednn, mkl"):
        install(model, "cublas", CPU)


def test_auto_takes_torch_where_nothing_else_runs(model: Model) -> None:
    assert install(model.double(), "auto", CPU).backend == "torch"


def test_auto_logs_what_it_measured(model: Model, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        chosen = install(model, "auto", CPU).backend
    messages = [record.getMessage() for record in caplog.records]
    assert any("at 1 / 8 / 32 / 128 rows" in message for message in messages)
    assert any(chosen in message for message in messages)


def test_measure_covers_every_backend_and_row_count() -> None:
    weights = [torch.randn(32, 16) for _ in range(3)] + [torch.randn(8, 16)]
    table = measure(weights, [TorchBackend(), OneDnnBackend()])
    assert set(table) == {"torch", "onednn"}
    assert all(len(figures) == len(ROWS) for figures in table.values())
    assert all(figure > 0 for figures in table.values() for figure in figures)


def test_choose_takes_the_best_or_a_mix_by_row_count() -> None:
    backends = [OneDnnBackend(), TorchBackend()]
    even = {"onednn": (10.0, 10.0, 10.0, 10.0), "torch": (9.8, 30.0, 30.0, 11.0)}
    assert choose(even, backends, may_copy=True).name == "onednn"
    mixed = {"onednn": (34.0, 34.0, 54.0, 156.0), "torch": (23.0, 66.0, 116.0, 110.0)}
    assert choose(mixed, backends, may_copy=False).name == "onednn"
    composite = choose(mixed, backends, may_copy=True)
    assert isinstance(composite, CompositeBackend)
    assert composite.name == "torch to 1 rows, onednn to 64 rows, torch above"
    assert len(LIMITS) == len(ROWS) - 1


def _siblings() -> tuple[list[SiblingKernel], torch.Tensor, list[int]]:
    weight, calls = torch.randn(10, 4), [0]
    kernel = TorchBackend().pack(weight, None)

    class Counting:
        nbytes = kernel.nbytes

        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            calls[0] += 1
            return kernel(x)

        def dense(self) -> torch.Tensor:
            return weight

    group = SiblingGroup(Counting(), [6, 4])
    return [SiblingKernel(group, 0, 96), SiblingKernel(group, 1, 64)], weight, calls


def test_siblings_share_one_product_for_one_input() -> None:
    (first, second), weight, calls = _siblings()
    for _ in range(2):
        x = torch.randn(3, 4)
        assert torch.equal(second(x), (x @ weight.t())[:, 6:])
        assert torch.equal(first(x), (x @ weight.t())[:, :6])
    assert calls == [2]


def test_siblings_never_give_results_of_another_input() -> None:
    (first, second), weight, calls = _siblings()
    a, b = torch.randn(3, 4), torch.randn(3, 4)
    torch.testing.assert_close(first(a), (a @ weight.t())[:, :6])
    torch.testing.assert_close(second(b), (b @ weight.t())[:, 6:])
    torch.testing.assert_close(second(a), (a @ weight.t())[:, 6:])
    torch.testing.assert_close(first(a), (a @ weight.t())[:, :6])
    # The same object with new content, as after a step that failed between two siblings.
    first(a)
    a.mul_(2.0)
    torch.testing.assert_close(first(a), (a @ weight.t())[:, :6])
    torch.testing.assert_close(second(a), (a @ weight.t())[:, 6:])
    assert calls == [5]


def test_siblings_let_go_of_their_input() -> None:
    (first, second), _, _ = _siblings()
    x = torch.randn(3, 4)
    seen = weakref.ref(x)
    first(x)
    second(x)
    del x
    assert seen() is None
