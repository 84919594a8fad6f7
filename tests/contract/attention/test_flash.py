"""The ``flash`` backend over providers that compute what their documentation says.

None of them runs without a GPU: stand-ins take their arguments.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.helpers.flash_stand_ins import (
    as_pages,
    flash_attn_varlen_func_v2,
    flash_attn_varlen_func_v4,
    flash_attn_with_kvcache_v3,
    paged_attention,
    varlen_attn,
)
from tests.helpers.paged_sequences import DEVICE, Sequences

from lorax_shard.attention.backend import AttentionLayer, AttentionSpec
from lorax_shard.attention.flash import backend as flash
from lorax_shard.attention.flash import providers
from lorax_shard.attention.flash.backend import FlashAttention
from lorax_shard.attention.flash.providers import Call, Provider, RowKind
from lorax_shard.attention.kv_cache import KVShape

CPU = torch.device("cpu")
HALF = torch.float16
SINKS = torch.linspace(-1.0, 2.0, 6)


def put(monkeypatch: pytest.MonkeyPatch, module: str, **contents: Any) -> None:
    monkeypatch.setitem(sys.modules, module, SimpleNamespace(**contents))


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, "flash_attn", flash_attn_varlen_func=flash_attn_varlen_func_v2)
    put(monkeypatch, "flash_attn.cute", flash_attn_varlen_func=flash_attn_varlen_func_v4)
    put(monkeypatch, "flash_attn_interface", flash_attn_with_kvcache=flash_attn_with_kvcache_v3)
    put(monkeypatch, "torch.nn.attention.varlen", varlen_attn=varlen_attn)


FRESH = frozenset({RowKind.FRESH})
# Of each: how it is found, on which device, and which of what is found.
FOUND = {
    "v2": (providers.find_v2, (8, 0), 1),
    "v2, fresh": (providers.find_v2, (8, 0), 0),
    "v3": (providers.find_v3, (9, 0), 0),
    "v4": (providers.find_v4, (10, 0), 0),
    "v4 on 9": (providers.find_v4, (9, 0), 0),
    "torch": (providers.find_torch, (8, 0), 1),
    "torch, fresh": (providers.find_torch, (8, 0), 0),
}


@pytest.fixture(params=FOUND)
def provider(request: pytest.FixtureRequest, stand_ins: None) -> Provider:
    find, capability, which = FOUND[request.param]
    found = find(capability)
    assert not isinstance(found, str)
    return found[which]


SPECS = {
    "plain": AttentionSpec(0.25),
    "scaled": AttentionSpec(0.31),
    "window": AttentionSpec(0.25, window=5),
    "window_of_one": AttentionSpec(0.25, window=1),
    "softcap": AttentionSpec(0.25, softcap=2.0),
    "sinks": AttentionSpec(0.25, sinks=SINKS),
    "chunk": AttentionSpec(0.25, chunk=6),
}
COMPUTED = {
    "flash-attn 2": {"plain", "scaled", "window", "window_of_one", "softcap"},
    "flash-attn 3": {"plain", "scaled", "window", "window_of_one", "softcap"},
    "flash-attn 4": {"plain", "scaled", "window", "window_of_one", "softcap", "sinks"},
    "torch.nn.attention.varlen": {"plain", "scaled", "window", "window_of_one"},
}


def layer_of(spec: AttentionSpec, block_size: int = 256, **kv: int) -> AttentionLayer:
    shape = {"num_heads": 2, "key_dim": 16, "value_dim": 16, **kv}
    return AttentionLayer.of(spec, 6, KVShape(**shape), block_size)


@pytest.mark.parametrize("spec", SPECS.values(), ids=list(SPECS))
def test_every_provider_computes_a_layer_or_says_what_it_lacks(
    provider: Provider, spec: AttentionSpec
) -> None:
    name = next(name for name, known in SPECS.items() if known is spec)
    reason = provider.refuse(layer_of(spec))
    assert (reason is None) == (name in COMPUTED[provider.name])
    if reason is not None:
        assert reason == {"chunk": "it knows no chunks"}.get(name, f"it knows no {name}")
        return
    asked = []
    counted = replace(
        provider, arguments=lambda call: asked.append(call.batch.kind) or provider.arguments(call)
    )
    # What the provider does not compute is left to the reference.
    backend = FlashAttention(counted)
    block_size = 16 if provider.kinds == FRESH else 256
    sequences = Sequences([300, 9, 30, 17], dtype=HALF, block_size=block_size, device=CPU)
    sequences.fill(backend, {0: 290})
    sequences.check(backend, spec, {0: 7, 1: 1, 2: 20, 3: 17})
    sequences.check(backend, spec, {0: 1, 1: 8, 2: 1})
    sequences.check(backend, spec, {0: 1, 2: 1})
    assert set(asked) == provider.kinds


def test_limits_are_named(provider: Provider) -> None:
    plain = SPECS["plain"]
    widths = "its heads are multiples of 8 and at most 256 wide"
    wide = "it reads paged KV of heads up to 128 wide"
    is_v4 = provider.name == "flash-attn 4"
    assert provider.refuse(layer_of(plain, key_dim=12, value_dim=12)) == widths
    too_wide = provider.refuse(layer_of(plain, key_dim=264, value_dim=264))
    assert too_wide == (wide if is_v4 else widths)
    small = provider.refuse(layer_of(plain, 16))
    if provider.name in ("flash-attn 3", "flash-attn 4") or provider.kinds == FRESH:
        assert small is None
    else:
        assert small == "its blocks are multiples of 256 tokens, not 16"
    assert (provider.refuse(layer_of(plain, key_dim=192, value_dim=128)) is None) == (
        provider.name == "flash-attn 3"
    )


def test_releases_without_what_is_needed_say_so(
    monkeypatch: pytest.MonkeyPatch, stand_ins: None
) -> None:
    def old(q: Any, k: Any, v: Any) -> None:
        raise AssertionError("never asked")

    put(monkeypatch, "flash_attn", flash_attn_varlen_func=old)
    put(monkeypatch, "torch.nn.attention.varlen", varlen_attn=old)
    found, refused = providers.find_all((8, 6))
    assert found == []
    assert refused == [
        "flash-attn 3: it is made for compute capability 9",
        "flash-attn 4: it is made for compute capability 9 and 10",
        "flash-attn 2: this release takes no window_size",
        "torch.nn.attention.varlen: this release takes no scale, window_size",
    ]


def test_releases_without_pages_compute_prompts_without_a_cached_part(
    monkeypatch: pytest.MonkeyPatch, stand_ins: None
) -> None:
    """As torch 2.11's, which knows no grouped heads by name either."""

    def packed(
        query: Any, key: Any, value: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int, *,
        return_aux: Any = None, scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
    ) -> torch.Tensor:  # fmt: skip
        pages = as_pages(key, value, cu_seq_k)
        lengths = cu_seq_k.diff().tolist()
        return paged_attention(
            query, *pages[:2], cu_seq_q, lengths, pages[2], max_q, max_k, scale, window_size
        )

    def old_v2(
        q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: int,
        max_seqlen_k: int, softmax_scale: float | None = None, causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
    ) -> torch.Tensor:  # fmt: skip
        return flash_attn_varlen_func_v2(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, 0.0, softmax_scale,
            causal, window_size,
        )  # fmt: skip

    put(monkeypatch, "torch.nn.attention.varlen", varlen_attn=packed)
    put(monkeypatch, "flash_attn", flash_attn_varlen_func=old_v2)
    for find in (providers.find_torch, providers.find_v2):
        (found,) = find((9, 0))
        assert found.kinds == FRESH
        sequences = Sequences([30, 9], dtype=HALF, block_size=16, device=CPU)
        sequences.check(FlashAttention(found), SPECS["window"], {0: 20, 1: 9})
        sequences.check(FlashAttention(found), SPECS["window"], {0: 10})
        assert found.refuse(layer_of(SPECS["softcap"], 16)) == "it knows no softcap"


def test_where_contexts_are_not_split_decodes_are_left_to_others(stand_ins: None) -> None:
    (on_9,), (on_10,) = providers.find_v4((9, 0)), providers.find_v4((10, 0))
    assert on_9.kinds == set(RowKind) - {RowKind.DECODE}
    assert on_10.kinds == set(RowKind)


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    refused = providers.find_all((9, 0))[1]
    assert any(line.startswith("flash-attn 3: it does not import") for line in refused)


def test_the_installed_pytorch_takes_our_arguments() -> None:
    found = providers.find_torch((9, 0))
    assert not isinstance(found, str)
    sequences = Sequences([5], dtype=HALF, block_size=256, device=CPU)
    metadata = sequences.metadata(FlashAttention(), {0: 5})
    own, pools = (torch.zeros(5, 2, 16),) * 2, (torch.zeros(1, 256, 2, 16),) * 2
    batch = flash.batches(metadata)[0]
    for each in found:
        call = Call(torch.zeros(5, 6, 16), *own, *pools, SPECS["window"], batch)
        inspect.signature(each.function).bind(**each.arguments(call))


def test_another_flash_attention_inside_pytorch_has_its_own_limits(
    monkeypatch: pytest.MonkeyPatch, stand_ins: None
) -> None:
    monkeypatch.setattr(
        torch.nn.attention, "current_flash_attention_impl", lambda: "FA3", raising=False
    )
    fresh, paged = providers.find_torch((9, 0))
    assert paged.refuse(layer_of(SPECS["plain"], 16)) is None
    sequences = Sequences([5], dtype=HALF, device=CPU)
    batch = flash.batches(sequences.metadata(FlashAttention(), {0: 5}))[0]
    call = Call(torch.zeros(5, 6, 16), *[torch.zeros(1)] * 4, SPECS["plain"], batch)
    assert paged.arguments(call)["cu_seq_k"] is None
    assert fresh.arguments(call)["cu_seq_k"] is batch.context_starts
    assert all("num_splits" not in each.arguments(call) for each in (fresh, paged))


def test_what_the_step_needs_is_made_once() -> None:
    sequences = Sequences([300, 9, 30], dtype=HALF, block_size=256, device=CPU)
    sequences.done = [0, 5, 0]
    metadata = sequences.metadata(FlashAttention(), {0: 3, 1: 1, 2: 30})
    decode, prompt = flash.batches(metadata)
    assert flash.batches(metadata)[0] is decode
    assert (decode.kind, prompt.kind) == (RowKind.DECODE, RowKind.FRESH)
    assert (decode.tokens, prompt.tokens) == (slice(0, 1), slice(1, 34))
    assert decode.query_starts.tolist() == [0, 1]
    assert prompt.query_starts.tolist() == [0, 3, 33]
    assert prompt.context_lens.tolist() == [3, 30]
    assert prompt.context_starts.tolist() == [0, 3, 33]
    assert (decode.longest_query, prompt.longest_query, prompt.longest_context) == (1, 30, 30)
    assert torch.equal(prompt.tables, metadata.block_tables[1:].int())
    part = flash.part_of(metadata, prompt)
    assert flash.part_of(metadata, prompt) is part
    assert (part.query_lens, part.num_decode_rows) == ([3, 30], 0)
    assert torch.equal(part.slots, metadata.slots[1:])


def test_neighbours_of_one_kind_are_asked_together() -> None:
    sequences = Sequences([9, 30, 30, 8, 7], dtype=HALF, device=CPU)
    sequences.done = [8, 5, 0, 0, 3]
    metadata = sequences.metadata(FlashAttention(), {0: 1, 1: 20, 2: 30, 3: 8, 4: 2})
    found = [(batch.kind, batch.rows, batch.tokens) for batch in flash.batches(metadata)]
    assert found == [
        (RowKind.DECODE, slice(0, 1), slice(0, 1)),
        (RowKind.CACHED, slice(1, 2), slice(1, 21)),
        (RowKind.FRESH, slice(2, 4), slice(21, 59)),
        (RowKind.CACHED, slice(4, 5), slice(59, 61)),
    ]


@pytest.fixture
def chosen_from(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Return a function that sets the providers of this machine."""

    def forget() -> None:
        flash._choose.cache_clear()
        flash._failure.cache_clear()

    forget()

    def provide(*providers: Provider) -> None:
        forget()
        monkeypatch.setattr(flash, "_providers", lambda device: (list(providers), []))

    yield provide
    forget()


def off_by_one(call: Call) -> dict[str, Any]:
    given = providers.arguments_v3(call)
    return {**given, "window_size": (given["window_size"][0] + 1, 0)}


def unshifted(call: Call) -> dict[str, Any]:
    batch = call.batch._replace(context_lens=call.batch.context_lens - 1)
    return providers.arguments_v3(call._replace(batch=batch))


def wrong_table(call: Call) -> dict[str, Any]:
    batch = call.batch._replace(tables=call.batch.tables.flip(1))
    return providers.arguments_v3(call._replace(batch=batch))


def broken(call: Call) -> dict[str, Any]:
    raise RuntimeError("no kernel image\nis available")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (off_by_one, "a trial step was off by"),
        (unshifted, "a trial step was off by"),
        (wrong_table, "a trial step was off by"),
        (broken, "a trial step failed: no kernel image"),
    ],
)
def test_a_provider_that_fails_its_trial_is_passed_over(
    chosen_from: Any, arguments: Any, words: str
) -> None:
    good = Provider("good", flash_attn_with_kvcache_v3, providers.arguments_v3, lambda layer: None)
    bad = Provider("bad", flash_attn_with_kvcache_v3, arguments, lambda layer: None)
    layer = layer_of(AttentionSpec(0.25, window=4096), 16)
    chosen_from(bad, good)
    assert FlashAttention.supports(layer, CPU, HALF) is None
    assert all(flash._choose(kind, layer, CPU, HALF) is good for kind in RowKind)
    chosen_from(bad)
    reason = FlashAttention.supports(layer, CPU, HALF)
    assert reason is not None
    assert reason.startswith(f"bad: {words}")


def test_each_layer_gets_the_first_provider_that_computes_it(chosen_from: Any) -> None:
    def provider(name: str, refuse: Any) -> Provider:
        return Provider(name, flash_attn_varlen_func_v4, providers.arguments_v4, refuse)

    def no_sinks(layer: AttentionLayer) -> str | None:
        return "it knows no sinks" if layer.has_sinks else None

    first, second = provider("first", no_sinks), provider("second", lambda layer: None)
    chosen_from(first, second)
    assert flash._choose(RowKind.FRESH, layer_of(SPECS["plain"]), CPU, HALF) is first
    assert flash._choose(RowKind.FRESH, layer_of(SPECS["sinks"]), CPU, HALF) is second
    sequences = Sequences([20, 9], dtype=HALF, device=CPU)
    sequences.check(FlashAttention(), SPECS["plain"], {0: 9, 1: 1})
    sequences.check(FlashAttention(), SPECS["sinks"], {0: 1, 1: 8})


def test_what_no_provider_computes_is_left_to_triton(
    chosen_from: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fresh = replace(
        Provider("prompts", flash_attn_varlen_func_v4, providers.arguments_v4, lambda layer: None),
        kinds=FRESH,
    )
    chosen_from(fresh)
    layer = layer_of(SPECS["plain"], 16)
    monkeypatch.setattr(flash, "_why_no_fallback", lambda device, dtype: "it is not installed")
    reason = FlashAttention.supports(layer, CPU, HALF)
    assert reason == "decodes: there is no provider; triton: it is not installed"
    monkeypatch.setattr(flash, "_why_no_fallback", lambda device, dtype: None)
    assert FlashAttention.supports(layer, CPU, HALF) is None
    with caplog.at_level("INFO"):
        FlashAttention().warm_up(layer, CPU, HALF, HALF)
    assert "decodes by triton, prompts without a cached part by prompts" in caplog.text
    seen = []
    general = flash._general(CPU)
    monkeypatch.setattr(general, "attend", lambda *given: seen.append(given) or attend(*given))
    attend = type(general)().attend
    sequences = Sequences([20, 9, 7], dtype=HALF, device=CPU)
    for counts, left in (({0: 9, 1: 9}, 0), ({0: 1, 2: 7}, 1), ({0: 10}, 2)):
        sequences.check(FlashAttention(), SPECS["plain"], counts)
        assert len(seen) == left


def test_a_row_of_nans_harms_no_later_owner_of_its_blocks(chosen_from: Any) -> None:
    """Stand-ins read no further than a row's end; what is stored is finite all the same."""
    sequences = Sequences([10], dtype=HALF, device=CPU)
    for broken_rows in (sequences.keys[0], sequences.values[0]):
        broken_rows[4:] = float("nan")
    sequences.fill(FlashAttention(), {0: 10})
    pools = (*sequences.cache.keys.values(), *sequences.cache.values.values())
    assert all(bool(pool.isfinite().all()) for pool in pools)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("spec", SPECS.values(), ids=list(SPECS))
@pytest.mark.parametrize("block_size", [16, 256])
def test_on_a_gpu(block_size: int, spec: AttentionSpec, dtype: torch.dtype) -> None:
    if reason := FlashAttention.probe(DEVICE, dtype):
        pytest.skip(reason)
    layer = layer_of(spec, block_size, key_dim=64, value_dim=64)
    if reason := FlashAttention.supports(layer, DEVICE, dtype):
        pytest.skip(reason)
    spec = spec if spec.sinks is None else spec._replace(sinks=spec.sinks.to(DEVICE))
    sequences = Sequences(
        [700, 9, 30, 45],
        dtype=dtype,
        block_size=block_size,
        key_dim=64,
        value_dim=64,
        device=DEVICE,
    )
    sequences.fill(FlashAttention(), {0: 290})
    sequences.check(FlashAttention(), spec, {0: 300, 1: 1, 2: 20, 3: 44})
    sequences.check(FlashAttention(), spec, {0: 1, 1: 1, 2: 1, 3: 1})
