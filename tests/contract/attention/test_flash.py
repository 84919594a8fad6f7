"""The ``flash`` backend over providers that compute what their documentation says.

None of them runs without a GPU. Each stand-in takes the arguments of the function whose name it
bears and computes, slowly, what that function promises for them: an argument that is wrong, of a
wrong type or missing gives a wrong result or an error.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.helpers.paged_sequences import DEVICE, Sequences

from lorax_shard.attention.backend import AttentionLayer, AttentionSpec
from lorax_shard.attention.flash import backend as flash
from lorax_shard.attention.flash import providers
from lorax_shard.attention.flash.backend import FlashAttention
from lorax_shard.attention.flash.providers import Call, Provider
from lorax_shard.attention.kv_cache import KVShape

CPU = torch.device("cpu")
HALF = torch.float16
SINKS = torch.linspace(-1.0, 2.0, 6)


def is_int32(*tensors: torch.Tensor) -> None:
    for tensor in tensors:
        assert tensor.dtype is torch.int32
        assert tensor.is_contiguous()


def paged_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    starts: torch.Tensor,
    lengths: list[int],
    table: torch.Tensor,
    longest_query: int,
    longest_context: int,
    scale: float,
    window: tuple[int, int],
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention over pages, queries at the end of their contexts, within (left, right)."""
    is_int32(starts, table)
    assert starts[0] == 0
    assert starts[-1] == q.shape[0]
    assert table.shape[0] == len(lengths) == starts.shape[0] - 1
    assert q.dtype in (torch.float16, torch.bfloat16)
    output = torch.zeros(*q.shape[:2], v.shape[-1], dtype=q.dtype)
    for row, length in enumerate(lengths):
        first, last = int(starts[row]), int(starts[row + 1])
        # A kernel is launched for the longest row that it was told of, and no further.
        last = min(last, first + longest_query)
        keys, values = (pages[table[row].long()].flatten(0, 1)[:length] for pages in (k, v))
        at = torch.arange(length)
        query_at = length - int(starts[row + 1]) + torch.arange(first, last)[:, None]
        seen = (at < longest_context).expand(last - first, -1).clone()
        left, right = window
        if left >= 0:
            seen &= at >= query_at - left
        if right >= 0:
            seen &= at <= query_at + right
        group = q.shape[1] // k.shape[2]
        for head in range(q.shape[1]):
            scores = q[first:last, head].double() @ keys[:, head // group].double().T * scale
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            weights = scores.exp() * seen
            total = weights.sum(1, keepdim=True)
            if sinks is not None:
                total += sinks[head].double().exp()
            output[first:last, head] = (weights / total @ values[:, head // group].double()).to(
                q.dtype
            )
    return output


def flash_attn_varlen_func_v2(
    q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: int,
    max_seqlen_k: int, dropout_p: float = 0.0, softmax_scale: float | None = None,
    causal: bool = False, window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    block_table: Any = None,
) -> torch.Tensor:  # fmt: skip
    assert k.shape[1] % 256 == 0
    is_int32(cu_seqlens_k)
    left, right = window_size
    return paged_attention(
        q, k, v, cu_seqlens_q, cu_seqlens_k.diff().tolist(), block_table, max_seqlen_q,
        max_seqlen_k, softmax_scale, (left, 0 if causal else right), softcap,
    )  # fmt: skip


def flash_attn_with_kvcache_v3(
    q: Any, k_cache: Any, v_cache: Any, k: Any = None, v: Any = None, qv: Any = None,
    cache_seqlens: Any = None, page_table: Any = None, cu_seqlens_q: Any = None,
    max_seqlen_q: int | None = None, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, num_splits: int = 0,
) -> torch.Tensor:  # fmt: skip
    is_int32(cache_seqlens)
    left, right = window_size
    return paged_attention(
        q, k_cache, v_cache, cu_seqlens_q, cache_seqlens.tolist(), page_table, max_seqlen_q,
        sys.maxsize, softmax_scale, (left, 0 if causal else right), softcap,
    )  # fmt: skip


def flash_attn_varlen_func_v4(
    q: Any, k: Any, v: Any, cu_seqlens_q: Any = None, cu_seqlens_k: Any = None,
    max_seqlen_q: int | None = None, max_seqlen_k: int | None = None, seqused_q: Any = None,
    seqused_k: Any = None, page_table: Any = None, softmax_scale: float | None = None,
    causal: bool = False, window_size: tuple[int | None, int | None] = (None, None),
    learnable_sink: Any = None, softcap: float = 0.0, num_splits: int = 1,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    assert cu_seqlens_k is None
    assert learnable_sink is None or learnable_sink.dtype is torch.bfloat16
    is_int32(seqused_k)
    left, right = (-1 if reach is None else reach for reach in window_size)
    output = paged_attention(
        q, k, v, cu_seqlens_q, seqused_k.tolist(), page_table, max_seqlen_q, max_seqlen_k,
        softmax_scale, (left, 0 if causal else right), softcap, learnable_sink,
    )  # fmt: skip
    return output, None


def varlen_attn(
    query: Any, key: Any, value: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int, *,
    return_aux: Any = None, scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False, seqused_k: Any = None,
    block_table: Any = None, num_splits: int | None = None,
) -> torch.Tensor:  # fmt: skip
    assert enable_gqa
    assert num_splits == 1
    assert key.shape[1] % 256 == 0
    is_int32(seqused_k, cu_seq_k)
    assert cu_seq_k.diff().tolist() == seqused_k.tolist()
    return paged_attention(
        query, key, value, cu_seq_q, seqused_k.tolist(), block_table, max_q, max_k, scale,
        window_size,
    )  # fmt: skip


def put(monkeypatch: pytest.MonkeyPatch, module: str, **contents: Any) -> None:
    monkeypatch.setitem(sys.modules, module, SimpleNamespace(**contents))


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, "flash_attn", flash_attn_varlen_func=flash_attn_varlen_func_v2)
    put(monkeypatch, "flash_attn.cute", flash_attn_varlen_func=flash_attn_varlen_func_v4)
    put(monkeypatch, "flash_attn_interface", flash_attn_with_kvcache=flash_attn_with_kvcache_v3)
    put(monkeypatch, "torch.nn.attention.varlen", varlen_attn=varlen_attn)


CAPABILITY = {"v2": (8, 0), "v3": (9, 0), "v4": (10, 0), "torch": (8, 0)}
FINDERS = {
    "v2": providers.find_v2,
    "v3": providers.find_v3,
    "v4": providers.find_v4,
    "torch": providers.find_torch,
}


@pytest.fixture(params=FINDERS)
def provider(request: pytest.FixtureRequest, stand_ins: None) -> Provider:
    found = FINDERS[request.param](CAPABILITY[request.param])
    assert isinstance(found, Provider)
    return found


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
    backend = FlashAttention(provider)
    sequences = Sequences([300, 9, 30], dtype=HALF, block_size=256, device=CPU)
    sequences.fill(backend, {0: 290})
    sequences.check(backend, spec, {0: 7, 1: 1, 2: 20})
    sequences.check(backend, spec, {0: 1, 1: 8, 2: 1})
    sequences.check(backend, spec, {0: 1, 2: 1})


def test_limits_are_named(provider: Provider) -> None:
    plain = SPECS["plain"]
    widths = "its heads are multiples of 8 and at most 256 wide"
    wide = "it reads paged KV of heads up to 128 wide"
    is_v4 = provider.name == "flash-attn 4"
    assert provider.refuse(layer_of(plain, key_dim=12, value_dim=12)) == widths
    too_wide = provider.refuse(layer_of(plain, key_dim=264, value_dim=264))
    assert too_wide == (wide if is_v4 else widths)
    small = provider.refuse(layer_of(plain, 16))
    if provider.name in ("flash-attn 3", "flash-attn 4"):
        assert small is None
    else:
        assert small == "its blocks are multiples of 256 tokens, not 16"
    assert (provider.refuse(layer_of(plain, key_dim=192, value_dim=128)) is None) == (
        provider.name == "flash-attn 3"
    )


def test_releases_without_what_is_needed_say_so(
    monkeypatch: pytest.MonkeyPatch, stand_ins: None
) -> None:
    def old(q: Any, k: Any, v: Any, window_size: Any) -> None:
        raise AssertionError("never asked")

    put(monkeypatch, "flash_attn", flash_attn_varlen_func=old)
    put(monkeypatch, "torch.nn.attention.varlen", varlen_attn=old)
    found, refused = providers.find_all((8, 6))
    assert found == []
    assert refused == [
        "flash-attn 4: it reads paged KV on compute capability 10 only",
        "flash-attn 3: it is made for compute capability 9",
        "flash-attn 2: this release takes no block_table",
        "torch.nn.attention.varlen: this release takes no block_table, scale, seqused_k",
    ]


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    refused = providers.find_all((9, 0))[1]
    assert any(line.startswith("flash-attn 3: it does not import") for line in refused)


def test_the_installed_pytorch_takes_our_arguments() -> None:
    found = providers.find_torch((9, 0))
    if isinstance(found, str):
        assert found.startswith("this release takes no ")
        pytest.skip(f"torch {torch.__version__}: {found}")
    sequences = Sequences([5], dtype=HALF, block_size=256, device=CPU)
    metadata = sequences.metadata(FlashAttention(found), {0: 5})
    pools = (torch.zeros(1, 256, 2, 16),) * 2
    call = Call(torch.zeros(5, 6, 16), *pools, SPECS["window"], flash.batches(metadata)[0])
    inspect.signature(found.function).bind(**found.arguments(call))


def test_another_flash_attention_inside_pytorch_has_its_own_limits(
    monkeypatch: pytest.MonkeyPatch, stand_ins: None
) -> None:
    monkeypatch.setattr(
        torch.nn.attention, "current_flash_attention_impl", lambda: "FA3", raising=False
    )
    found = providers.find_torch((9, 0))
    assert isinstance(found, Provider)
    assert found.refuse(layer_of(SPECS["plain"], 16)) is None
    sequences = Sequences([5], dtype=HALF, device=CPU)
    batch = flash.batches(sequences.metadata(FlashAttention(found), {0: 5}))[0]
    given = found.arguments(
        Call(torch.zeros(5, 6, 16), *[torch.zeros(1)] * 2, SPECS["plain"], batch)
    )
    assert given["cu_seq_k"] is None
    assert "num_splits" not in given


def test_what_the_step_needs_is_made_once() -> None:
    sequences = Sequences([300, 9, 30], dtype=HALF, block_size=256, device=CPU)
    metadata = sequences.metadata(FlashAttention(), {0: 3, 1: 1, 2: 30})
    decode, prompt = flash.batches(metadata)
    assert flash.batches(metadata)[0] is decode
    assert (decode.tokens, prompt.tokens) == (slice(0, 1), slice(1, 34))
    assert decode.query_starts.tolist() == [0, 1]
    assert prompt.query_starts.tolist() == [0, 3, 33]
    assert prompt.context_lens.tolist() == [3, 30]
    assert prompt.context_starts.tolist() == [0, 3, 33]
    assert (decode.longest_query, prompt.longest_query, prompt.longest_context) == (1, 30, 30)
    assert torch.equal(prompt.tables, metadata.block_tables[1:].int())


@pytest.fixture
def chosen_from(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Return a function that sets the providers of this machine."""
    flash._choose.cache_clear()

    def provide(*providers: Provider) -> None:
        monkeypatch.setattr(flash, "_providers", lambda device: (list(providers), []))

    yield provide
    flash._choose.cache_clear()


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
    assert flash._choose(layer, CPU, HALF) is good
    flash._choose.cache_clear()
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
    assert flash._choose(layer_of(SPECS["plain"]), CPU, HALF) is first
    assert flash._choose(layer_of(SPECS["sinks"]), CPU, HALF) is second
    sequences = Sequences([20, 9], dtype=HALF, device=CPU)
    sequences.check(FlashAttention(), SPECS["plain"], {0: 9, 1: 1})
    sequences.check(FlashAttention(), SPECS["sinks"], {0: 1, 1: 8})


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
def test_on_a_gpu(spec: AttentionSpec, dtype: torch.dtype) -> None:
    if reason := FlashAttention.probe(DEVICE, dtype):
        pytest.skip(reason)
    if reason := FlashAttention.supports(layer_of(spec, key_dim=64, value_dim=64), DEVICE, dtype):
        pytest.skip(reason)
    spec = spec if spec.sinks is None else spec._replace(sinks=spec.sinks.to(DEVICE))
    sequences = Sequences(
        [700, 9, 30], dtype=dtype, block_size=256, key_dim=64, value_dim=64, device=DEVICE
    )
    sequences.fill(FlashAttention(), {0: 290})
    sequences.check(FlashAttention(), spec, {0: 300, 1: 1, 2: 20})
    sequences.check(FlashAttention(), spec, {0: 1, 1: 1, 2: 1})
