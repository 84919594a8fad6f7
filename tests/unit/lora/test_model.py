"""Slots: what fits, what is refused and how, and what loading and unloading leave behind."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.helpers.naive_delta import apply_adapter
from torch import nn
from torch.nn import functional

from lorax_shard.linear import install as install_linears
from lorax_shard.lora.delta import HostAdapter, ModuleDelta
from lorax_shard.lora.errors import AdapterMismatchError
from lorax_shard.lora.model import LoraModel, install
from lorax_shard.lora.sites import Kind, find_groups, find_sites

CPU = torch.device("cpu")


class Conv1D(nn.Module):
    """As transformers' own: known by its name, keeps its weight as in x out."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + self.bias


class Block(nn.Module):
    """Siblings, a norm, a fused projection, and experts that an adapter cannot reach."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.q_proj = nn.Linear(8, 8)
        self.k_proj = nn.Linear(8, 4, bias=False)
        self.v_proj = nn.Linear(8, 4, bias=False)
        self.fused = Conv1D(8, 8)
        self.experts = nn.ModuleList([nn.Linear(8, 8)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.fused(q) + torch.cat([k, v], dim=-1)


class Toy(nn.Module):
    """Enough of a causal model: embedding, block, head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(12, 8)
        self.block = Block()
        self.lm_head = nn.Linear(8, 12, bias=False)
        self.requires_grad_(False)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.block(self.embed(ids)[None]))[0]


def delta(out: int, width: int, rank: int = 2, **parts: Any) -> ModuleDelta:
    return ModuleDelta(a=torch.randn(rank, width), b=torch.randn(out, rank), scaling=0.5, **parts)


def adapter(digest: str = "d", vocab_size: int = 0, **modules: ModuleDelta) -> HostAdapter:
    """Keywords are module names with two underscores for a dot."""
    named = {name.replace("__", "."): value for name, value in modules.items()}
    return HostAdapter(digest=digest, modules=named, vocab_size=vocab_size)


def small() -> HostAdapter:
    return adapter(block__q_proj=delta(8, 8), block__v_proj=delta(4, 8, 3))


@pytest.fixture
def toy() -> Toy:
    return Toy().eval()


@pytest.fixture
def lora(toy: Toy) -> LoraModel:
    return install(toy, "torch", CPU, torch.float32)


IDS = torch.tensor([3, 1, 4, 1, 5])


def test_places_are_found_by_their_names_in_the_model(toy: Toy) -> None:
    sites = find_sites(toy)
    kinds = {name: site.kind for name, site in sites.items()}
    assert kinds == {
        "embed": Kind.EMBEDDING,
        "block.norm": Kind.VECTOR,
        "block.q_proj": Kind.LINEAR,
        "block.k_proj": Kind.LINEAR,
        "block.v_proj": Kind.LINEAR,
        "block.fused": Kind.LINEAR,
        "lm_head": Kind.LINEAR,
    }
    assert [name for name, site in sites.items() if site.is_head] == ["lm_head"]
    assert [name for name, site in sites.items() if site.is_transposed] == ["block.fused"]


@pytest.mark.parametrize("backend", [None, "torch", "onednn"])
def test_siblings_are_one_group_whatever_computes_them(toy: Toy, backend: str | None) -> None:
    if backend is not None:
        install_linears(toy, backend, CPU)
    sites = find_sites(toy)
    groups = [[site.name.rpartition(".")[2] for site in group] for group in find_groups(sites)]
    assert groups == [["q_proj", "k_proj", "v_proj"], ["fused"], ["lm_head"]]
    assert sites["block.fused"].is_transposed
    torch.testing.assert_close(sites["block.fused"].weight, Toy().block.fused.weight.T)


REFUSED: dict[str, tuple[Callable[[], HostAdapter], str]] = {
    "no such module": (
        lambda: adapter(block__w_proj=delta(8, 8)),
        "it changes 'block.w_proj', and the model has no such",
    ),
    "an expert": (lambda: adapter(block__experts__0=delta(8, 8)), "'block.experts.0'"),
    "another width of A": (
        lambda: adapter(block__q_proj=delta(8, 16)),
        "its A of 'block.q_proj' is 2 x 16, but the model asks for 2 x 8",
    ),
    "another width of B": (
        lambda: adapter(block__k_proj=delta(8, 8)),
        "its B of 'block.k_proj' is 8 x 2, but the model asks for 4 x 2",
    ),
    "A without B": (
        lambda: adapter(block__q_proj=ModuleDelta(a=torch.ones(2, 8))),
        "only one of A and B",
    ),
    "a magnitude alone": (
        lambda: adapter(block__q_proj=ModuleDelta(magnitude=torch.ones(8))),
        "without A and B",
    ),
    "a magnitude of another length": (
        lambda: adapter(block__q_proj=delta(8, 8, magnitude=torch.ones(4))),
        "DoRA magnitude of 'block.q_proj' is 4",
    ),
    "a bias for none": (
        lambda: adapter(block__k_proj=delta(4, 8, bias=torch.ones(4))),
        "a bias for 'block.k_proj', which has none",
    ),
    "a bias of another length": (
        lambda: adapter(block__q_proj=ModuleDelta(bias=torch.ones(9))),
        "its bias of 'block.q_proj' is 9",
    ),
    "a weight of another shape": (
        lambda: adapter(block__q_proj=ModuleDelta(weight=torch.ones(9, 8))),
        "its weight of 'block.q_proj' is 9 x 8, but the model asks for 8 x 8",
    ),
    "an embedding of another dim": (
        lambda: adapter(embed=ModuleDelta(weight=torch.ones(12, 9))),
        "its weight of 'embed' is 12 x 9",
    ),
    "a bias for an embedding": (
        lambda: adapter(embed=ModuleDelta(bias=torch.ones(8))),
        "a bias for the embedding 'embed'",
    ),
    "a norm with A and B": (lambda: adapter(block__norm=delta(8, 8)), "a norm: only its param"),
    "a norm of another length": (
        lambda: adapter(block__norm=ModuleDelta(bias=torch.ones(9))),
        "its bias of 'block.norm' is 9, but the model asks for 8",
    ),
    "tokens beyond the vocabulary": (
        lambda: adapter(
            embed=ModuleDelta(token_ids=torch.tensor([12]), token_rows=torch.ones(1, 8))
        ),
        "outside its 12 tokens",
    ),
    "a token twice": (
        lambda: adapter(
            embed=ModuleDelta(token_ids=torch.tensor([2, 2]), token_rows=torch.ones(2, 8))
        ),
        "a token row of 'embed' twice",
    ),
    "token ids without rows": (
        lambda: adapter(embed=ModuleDelta(token_ids=torch.tensor([2]))),
        "only one of token ids and token rows",
    ),
    "tokens of a linear with a bias": (
        lambda: adapter(
            block__q_proj=ModuleDelta(token_ids=torch.tensor([2]), token_rows=torch.ones(1, 8))
        ),
        "which has a bias",
    ),
    "more tokens than logits": (
        lambda: replace(small(), vocab_size=14),
        "its tokenizer has 14 tokens, but its head computes 12",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_in_words(lora: LoraModel, case: str) -> None:
    make, text = REFUSED[case]
    with pytest.raises(AdapterMismatchError) as info:
        lora.load(0, make())
    assert text in str(info.value)
    assert lora.slots == {}


def test_base_rows_keep_every_bit(toy: Toy, lora: LoraModel) -> None:
    before = toy(IDS)
    lora.load(3, small())
    with lora.step([2, 3], [3, None]):
        mixed = toy(IDS)
    assert torch.equal(mixed[2:], before[2:])
    assert not torch.allclose(mixed[:2], before[:2])
    with lora.step([5], [None]):
        assert torch.equal(toy(IDS), before)
    assert torch.equal(toy(IDS), before)


def test_an_adapter_computes_the_formula(toy: Toy, lora: LoraModel) -> None:
    bias, magnitude = torch.randn(8), torch.rand(8) + 0.5
    change = delta(8, 8, 3, bias=bias, magnitude=magnitude)
    lora.load(0, adapter(block__fused=change))
    x = torch.randn(1, 4, 8)
    with lora.step([4], [0]):
        actual = toy.block.fused(x)
    assert change.a is not None
    assert change.b is not None
    full = toy.block.fused.weight.T + 0.5 * change.b @ change.a
    full = full * (magnitude / full.norm(dim=1))[:, None]
    torch.testing.assert_close(actual, functional.linear(x, full, bias))


def test_replaced_tokens_and_dora_together(toy: Toy, lora: LoraModel) -> None:
    ids, rows = torch.tensor([9, 4]), torch.randn(2, 8)
    tokens = {"token_ids": ids, "token_rows": rows}
    on_embedding = delta(8, 12, magnitude=torch.rand(8) + 0.5, **tokens)
    on_head = delta(12, 8, magnitude=torch.rand(12) + 0.5, **tokens)
    lora.load(0, adapter(embed=on_embedding, lm_head=on_head))
    hidden = torch.randn(1, 5, 8)
    with lora.step([5], [0]):
        embedded, logits = toy.embed(IDS), toy.lm_head(hidden)
    expected = apply_adapter(Toy(), adapter(embed=on_embedding, lm_head=on_head))
    torch.testing.assert_close(embedded, expected.embed(IDS))
    torch.testing.assert_close(logits, expected.lm_head(hidden))


def test_two_slots_with_one_content_are_alike(toy: Toy, lora: LoraModel) -> None:
    prepared = lora.prepare(small())
    lora.load(0, prepared)
    lora.load(9, prepared)
    ids = IDS.repeat(2)
    with lora.step([5, 5], [0, 9]):
        both = toy(ids)
    torch.testing.assert_close(both[:5], both[5:])


def test_unloading_restores_the_model(toy: Toy, lora: LoraModel) -> None:
    before = toy(IDS)
    names = {name for name, _ in toy.named_modules()}
    lora.load(0, small())
    lora.load(1, adapter(embed=delta(8, 12), block__norm=ModuleDelta(bias=torch.ones(8))))
    lora.unload(0)
    with lora.step([5], [1]):
        assert not torch.allclose(toy(IDS), before)
    lora.unload(1)
    assert lora.slots == {}
    assert torch.equal(toy(IDS), before)
    assert {name for name, _ in toy.named_modules()} == names
    assert not any("forward" in module.__dict__ for module in toy.modules())


def test_only_modules_that_an_adapter_changes_are_touched(toy: Toy, lora: LoraModel) -> None:
    lora.load(0, small())
    touched = [name for name, module in toy.named_modules() if "forward" in module.__dict__]
    assert touched == ["block.q_proj", "block.v_proj"]


@pytest.mark.parametrize("backend", ["torch", "cpu", "cpp"])
def test_unloading_frees_the_memory(toy: Toy, backend: str) -> None:
    lora = install(toy, backend, CPU, torch.float32)
    prepared = lora.prepare(small())
    tensors = [weakref.ref(weights.a) for weights in prepared.groups.values()]
    lora.load(0, prepared)
    with lora.step([5], [0]):
        toy(IDS)
    del prepared
    assert all(tensor() is not None for tensor in tensors)
    lora.unload(0)
    gc.collect()
    assert all(tensor() is None for tensor in tensors)


def test_bytes_of_an_adapter_are_those_of_its_tensors(lora: LoraModel) -> None:
    made = small()
    assert lora.prepare(made).nbytes == made.nbytes
    assert lora.prepare(made).max_rank == 3


def test_slots_are_used_once(lora: LoraModel) -> None:
    lora.load(0, small())
    with pytest.raises(ValueError, match="slot 0 holds an adapter"):
        lora.load(0, small())
    with pytest.raises(ValueError, match="slot 4 holds no adapter"):
        lora.unload(4)
    with pytest.raises(ValueError, match="numbered from 0"):
        lora.load(-1, small())


def fail(*args: object) -> None:
    raise RuntimeError("no memory")


@pytest.mark.parametrize("backend", ["torch", "cpu", "cpp"])
def test_a_load_that_fails_at_any_part_leaves_the_slot_empty(toy: Toy, backend: str) -> None:
    """Whichever part cannot be had: nothing of the others stays, and the slot can be used."""
    lora = install(toy, backend, CPU, torch.float32)
    before = toy(IDS)
    everything = adapter(
        block__q_proj=delta(8, 8, weight=torch.randn(8, 8)), block__v_proj=delta(4, 8, 3),
        embed=delta(8, 12), block__norm=ModuleDelta(bias=torch.ones(8)),
    )  # fmt: skip
    prepared, other = lora.prepare(everything), lora.prepare(small())
    parts = [
        *(lora._groups[number] for number in prepared.groups),
        *(lora._linears[name] for name in prepared.linears),
        *(lora._embeddings[name] for name in prepared.embeddings),
        *(lora._vectors[name] for name in prepared.vectors),
    ]
    names = ["load"] * len(parts) + ["commit"]
    parts.append(lora._backend)
    assert len(parts) >= 4
    for part, name in zip(parts, names, strict=True):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(part, name, fail)
            with pytest.raises(RuntimeError, match="no memory"):
                lora.load(0, prepared)
        assert lora.slots == {}
        assert not any("forward" in module.__dict__ for module in toy.modules())
        lora.load(0, other)
        with lora.step([5], [0]):
            adapted = toy(IDS)
        lora.unload(0)
        lora.load(1, other)
        with lora.step([5], [1]):
            assert torch.equal(toy(IDS), adapted)
        lora.unload(1)
        assert torch.equal(toy(IDS), before)


def test_a_step_never_computes_with_less_than_it_asked_for(lora: LoraModel) -> None:
    with pytest.raises(ValueError, match="slot 2 holds no adapter"), lora.step([1], [2]):
        pass


def test_adapters_change_between_steps_only(lora: LoraModel) -> None:
    lora.load(0, small())
    with lora.step([1], [0]):
        with pytest.raises(RuntimeError, match="between steps"):
            lora.load(1, small())
        with pytest.raises(RuntimeError, match="between steps"):
            lora.unload(0)
    lora.unload(0)


def test_a_failed_step_leaves_nothing_behind(toy: Toy, lora: LoraModel) -> None:
    before = toy(IDS)
    lora.load(0, small())
    with pytest.raises(RuntimeError, match="was given 5 rows in a step of 4"), lora.step([4], [0]):
        toy(IDS)
    assert torch.equal(toy(IDS), before)
    with lora.step([5], [0]):
        assert not torch.allclose(toy(IDS), before)


def test_a_norm_with_other_parameters(toy: Toy, lora: LoraModel) -> None:
    weight, bias = torch.randn(8), torch.randn(8)
    lora.load(0, adapter(block__norm=ModuleDelta(weight=weight, bias=bias)))
    x = torch.randn(1, 5, 8)
    before = toy.block.norm(x)
    with lora.step([2, 2, 1], [0, None, 0]):
        actual = toy.block.norm(x)
    expected = functional.layer_norm(x, (8,), weight, bias)
    torch.testing.assert_close(actual[0, [0, 1, 4]], expected[0, [0, 1, 4]])
    assert torch.equal(actual[0, 2:4], before[0, 2:4])


def test_logit_rows_use_the_adapters_of_their_tokens(toy: Toy, lora: LoraModel) -> None:
    change = delta(12, 8)
    lora.load(0, adapter(lm_head=change))
    hidden = torch.randn(1, 6, 8)
    rows = torch.tensor([5, 0, 3])
    with lora.step([3, 3], [None, 0], rows):
        actual = toy.lm_head(hidden[:, rows])[0]
    assert change.a is not None
    assert change.b is not None
    low_rank = 0.5 * hidden[0] @ change.a.T @ change.b.T
    expected = toy.lm_head(hidden)[0] + torch.cat([torch.zeros(3, 12), low_rank[3:]])
    torch.testing.assert_close(actual, expected[rows])


def test_fewer_tokens_than_the_base(toy: Toy, lora: LoraModel) -> None:
    weight = torch.randn(10, 8)
    lora.load(0, adapter(lm_head=ModuleDelta(weight=weight)))
    assert (lora.num_logits(0), lora.num_logits(None)) == (10, 12)
    hidden = torch.randn(1, 2, 8)
    with lora.step([1, 1], [0, None]):
        logits = toy.lm_head(hidden)[0]
    torch.testing.assert_close(logits[0, :10], hidden[0, 0] @ weight.T)
    assert torch.all(logits[0, 10:] == float("-inf"))
    assert torch.isfinite(logits[1]).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_take_the_model_s_dtype(dtype: torch.dtype) -> None:
    toy = Toy().to(dtype).eval()
    lora = install(toy, "auto", CPU, dtype)
    made = small()
    assert lora.prepare(made).nbytes == made.nbytes // 2
    lora.load(0, made)
    with lora.step([5], [0]):
        adapted = toy(IDS)
    assert adapted.dtype is dtype
    reference = Toy().eval()
    exact = install(reference, "torch", CPU, torch.float32)
    exact.load(0, made)
    with exact.step([5], [0]):
        expected = reference(IDS)
    assert float((adapted.float() - expected).abs().max() / expected.abs().max()) < 0.05
