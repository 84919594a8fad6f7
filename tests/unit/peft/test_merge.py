"""Refused merges, identity of merges, and DARE's draws; PEFT is asked in the oracle test."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from lorax_contract.adapters import Combination, MergeSpec
from lorax_contract.errors import ValidationError
from lorax_shard.lora.delta import HostAdapter, ModuleDelta
from lorax_shard.peft.digest import digest_adapter
from lorax_shard.peft.errors import AdapterRefusedError
from lorax_shard.peft.merge import merge, merge_digest
from lorax_shard.peft.merge_math import draw_mask, keep_random


def adapter(
    seed: int, *names: str, rank: int = 2, traits: frozenset[str] = frozenset()
) -> HostAdapter:
    generator = torch.Generator().manual_seed(seed)
    modules = {
        name: ModuleDelta(
            a=torch.randn(rank, 6, generator=generator),
            b=torch.randn(4, rank, generator=generator),
            scaling=0.5,
        )
        for name in names or ("q", "k")
    }
    return digest_adapter(HostAdapter(digest="", modules=modules, traits=traits))


def changed(seed: int, **parts: torch.Tensor) -> HostAdapter:
    plain = adapter(seed)
    modules = {**plain.modules, "k": dataclasses.replace(plain.modules["k"], **parts)}
    return dataclasses.replace(plain, modules=modules)


LINEAR = MergeSpec(weights=(1.0, 0.5))
RS = frozenset({"rslora"})


@pytest.mark.parametrize(
    ("second", "text"),
    [
        (changed(2, magnitude=torch.ones(4)), "adapter 2 .* it has a DoRA magnitude for k"),
        (changed(2, bias=torch.ones(4)), "it has a trained bias for k"),
        (changed(2, weight=torch.ones(4, 6)), "it has a weight of its own for k"),
        (changed(2, token_rows=torch.ones(1, 6)), "it has replaced rows for k"),
        (dataclasses.replace(adapter(2), vocab_size=9), "adapter 2 .* it adds tokens"),
        (dataclasses.replace(adapter(2), invocation_ids=(5,)), "adapter 2 .* a part of the prompt"),
        (adapter(2, rank=3), r"adapters of the ranks 2, 3 can be merged by cat only, .* \(q\)"),
    ],
)
def test_what_cannot_be_merged(second: HostAdapter, text: str) -> None:
    with pytest.raises(AdapterRefusedError, match=text):
        merge([adapter(1), second], LINEAR)


def test_only_a_first_adapter_with_rslora_is_refused() -> None:
    with pytest.raises(AdapterRefusedError, match="name an adapter without rsLoRA first"):
        merge([adapter(1, traits=RS), adapter(2)], LINEAR)
    assert merge([adapter(1), adapter(2, traits=RS)], LINEAR).modules


@pytest.mark.parametrize("combination", Combination)
def test_a_merge_changes_what_any_of_its_adapters_changes(combination: Combination) -> None:
    spec = MergeSpec(
        weights=(1.0, 0.5),
        combination=combination,
        density=0.5 if combination.prunes else None,
    )
    both, one = adapter(1), adapter(2, "k", "v")
    merged = merge([both, one], spec)
    assert set(merged.modules) == {"q", "k", "v"}
    # A module of one adapter is as if that adapter were merged alone, but for the choice of masks.
    if not combination.prunes:
        alone = merge([both], MergeSpec(weights=(1.0,), combination=combination)).modules["q"]
        assert torch.allclose(_product(merged.modules["q"]), _product(alone), atol=1e-6)


def _product(delta: ModuleDelta) -> torch.Tensor:
    assert delta.a is not None
    assert delta.b is not None
    return delta.scaling * delta.b @ delta.a


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"weights": ()}, "one finite weight"),
        ({"weights": (math.nan,)}, "one finite weight"),
        ({"combination": Combination.TIES}, "merging by ties needs a density"),
        ({"combination": Combination.DARE_TIES, "density": 0.0}, "above 0 and at most 1"),
        ({"combination": Combination.DARE_LINEAR, "density": 1.5}, "above 0 and at most 1"),
    ],
)
def test_specs_that_are_refused(values: dict[str, object], text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        MergeSpec(**{"weights": (1.0, 1.0), **values})  # type: ignore[arg-type]


def test_each_adapter_needs_a_weight() -> None:
    with pytest.raises(AdapterRefusedError, match="a merge of 1 adapters needs as many weights"):
        merge([adapter(1)], LINEAR)


def test_cat_computes_the_weighted_sum() -> None:
    spec = MergeSpec(weights=(0.5, -2.0), combination=Combination.CAT)
    merged = merge([adapter(1), adapter(2, rank=5)], spec).modules["q"]
    assert (merged.rank, merged.scaling) == (7, 1.0)

    one, other = (each.modules["q"] for each in (adapter(1), adapter(2, rank=5)))
    assert torch.allclose(_product(merged), 0.5 * _product(one) - 2 * _product(other), atol=1e-6)


def experts(seed: int, rank: int = 2) -> HostAdapter:
    generator = torch.Generator().manual_seed(seed)
    delta = ModuleDelta(
        a=torch.randn(3, rank, 6, generator=generator),
        b=torch.randn(3, 4, rank, generator=generator),
        scaling=0.5,
    )
    return digest_adapter(HostAdapter(digest="", modules={"experts": delta}))


def of_expert(adapter: HostAdapter, number: int) -> HostAdapter:
    """Return an adapter that changes one linear as the given one changes an expert."""
    delta = adapter.modules["experts"]
    assert delta.a is not None
    assert delta.b is not None
    own = dataclasses.replace(delta, a=delta.a[number], b=delta.b[number])
    return digest_adapter(HostAdapter(digest="", modules={"experts": own}))


@pytest.mark.parametrize("combination", [Combination.LINEAR, Combination.CAT])
def test_experts_are_merged_one_by_one(combination: Combination) -> None:
    spec = MergeSpec(weights=(0.5, -2.0), combination=combination)
    pair = [experts(1), experts(2, rank=5 if combination is Combination.CAT else 2)]
    merged = merge(pair, spec).modules["experts"]
    for number in range(3):
        alone = merge([of_expert(each, number) for each in pair], spec).modules["experts"]
        assert torch.allclose(_product(merged)[number], _product(alone), atol=1e-6)


def test_experts_are_not_merged_by_ties() -> None:
    pair = [experts(1), experts(2)]
    with pytest.raises(
        AdapterRefusedError, match=r"experts cannot be merged by ties, .*\(experts\)"
    ):
        merge(pair, MergeSpec(weights=(1.0, 1.0), combination=Combination.TIES, density=0.5))
    spec = MergeSpec(weights=(1.0, 1.0), combination=Combination.DARE_TIES, density=0.5)
    assert merge(pair, spec).modules["experts"].rank == 2


def test_experts_of_other_ranks_can_be_merged_by_cat_only() -> None:
    with pytest.raises(AdapterRefusedError, match=r"of the ranks 2, 5 can be merged by cat only"):
        merge([experts(1), experts(2, rank=5)], LINEAR)


def test_a_merge_is_named_by_adapters_and_spec() -> None:
    spec = MergeSpec(weights=(1.0, 0.5), combination=Combination.TIES, density=0.5)
    names = {
        merge_digest(spec, ["x", "y"]),
        merge_digest(spec, ["y", "x"]),
        merge_digest(LINEAR, ["x", "y"]),
        merge_digest(dataclasses.replace(spec, density=0.25), ["x", "y"]),
        merge_digest(dataclasses.replace(spec, weights=(1.0, 0.25)), ["x", "y"]),
        merge_digest(dataclasses.replace(spec, combination=Combination.DARE_TIES), ["x", "y"]),
    }
    assert len(names) == 6


def test_every_rank_and_every_reload_merges_the_same() -> None:
    spec = MergeSpec(weights=(1.0, 0.5), combination=Combination.DARE_TIES, density=0.5)
    first = merge([adapter(1), adapter(2)], spec)
    torch.manual_seed(99)
    torch.rand(5)
    # Another order of modules, as another reader may have it.
    turned = [
        dataclasses.replace(each, modules=dict(reversed(each.modules.items())))
        for each in (adapter(1), adapter(2))
    ]
    assert merge(turned, spec).digest == first.digest
    other = dataclasses.replace(spec, weights=(1.0, 0.5000001))
    assert merge([adapter(1), adapter(2)], other).digest != first.digest


def test_masks_are_fixed_for_ever() -> None:
    # A change of these values changes what merged adapters answer: it must not happen.
    assert draw_mask((2, 8), 0.5, "seed").int().tolist() == [
        [1, 0, 1, 1, 1, 0, 1, 1],
        [1, 1, 0, 1, 0, 1, 1, 0],
    ]


def test_masks_keep_the_asked_for_fraction_and_the_mean() -> None:
    for density in (0.1, 0.5, 0.9):
        mask = draw_mask((300, 400), density, f"{density}")
        spread = math.sqrt(density * (1 - density) / mask.numel())
        assert abs(mask.double().mean().item() - density) < 6 * spread
    kept = keep_random(torch.ones(300, 400), 0.25, "x")
    assert set(kept.unique().tolist()) == {0.0, 4.0}
