"""Who computes flash attention in this installation, and how each is asked.

A provider's arguments are made by a pure function from our terms, so that they can be tested
against what its documentation says without its kernels. All of them count a window as the keys
before a query's own (``left``), align causal masks to the end of the context, and take block
tables as int32. Some read paged KV of any block size, some of large blocks only; those compute at
least prompts of which nothing is cached, from K and V as they come out of the model.
"""

from __future__ import annotations

import enum
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from lorax_shard.attention.backend import AttentionLayer, AttentionSpec

# Blocks of FlashAttention 2, as a package and within PyTorch.
_BLOCK_MULTIPLE_V2 = 256
_WIDEST_HEAD = 256
# Arguments of FlashAttention 2 that not every release takes.
_OPTIONAL_V2 = {"softcap", "num_splits", "block_table"}


class RowKind(enum.Enum):
    """What a row computes: one token, a prompt of which nothing is cached, or a part of one."""

    DECODE = "decodes"
    FRESH = "prompts without a cached part"
    CACHED = "prompts with a cached part"


_EVERY_KIND = frozenset(RowKind)


class VarlenBatch(NamedTuple):
    """Neighbouring rows of one kind within a step, their numbers on the device as int32."""

    kind: RowKind
    rows: slice
    tokens: slice
    query_starts: torch.Tensor  # R + 1, from 0 within the batch
    context_starts: torch.Tensor  # R + 1
    context_lens: torch.Tensor  # R
    tables: torch.Tensor  # R x max_blocks
    longest_query: int
    longest_context: int


class Call(NamedTuple):
    """One layer's attention over one batch of a step."""

    query: torch.Tensor  # T x H x D
    # The batch's own, as stored.
    key: torch.Tensor  # T x G x D
    value: torch.Tensor  # T x G x E
    keys: torch.Tensor  # blocks x block_size x G x D
    values: torch.Tensor  # blocks x block_size x G x E
    spec: AttentionSpec
    batch: VarlenBatch


@dataclass(frozen=True)
class Provider:
    """A function that attends, and what it cannot compute."""

    name: str
    function: Callable[..., Any]
    arguments: Callable[[Call], dict[str, Any]]
    refuse: Callable[[AttentionLayer], str | None]
    # The rows that it computes.
    kinds: frozenset[RowKind] = _EVERY_KIND

    def attend(self, call: Call) -> torch.Tensor:
        """Return the T x H x E attention."""
        answer = self.function(**self.arguments(call))
        output: torch.Tensor = answer[0] if isinstance(answer, tuple) else answer
        return output


def find_all(capability: tuple[int, int]) -> tuple[list[Provider], list[str]]:
    """Return the providers for a device of this compute capability, best first, and refusals."""
    found: list[Provider] = []
    refused: list[str] = []
    for name, find in _FINDERS.items():
        try:
            answer = find(capability)
        except (ImportError, OSError, AttributeError) as error:
            answer = f"it does not import: {error}"
        if isinstance(answer, str):
            refused.append(f"{name}: {answer}")
        else:
            found += answer
    return found, refused


def find_v4(capability: tuple[int, int]) -> list[Provider] | str:
    """Return FlashAttention 4 (``flash_attn.cute``), for compute capability 9 and 10.

    On 9 it does not split a context, which decodes need. Releases that do not read paged KV there
    show it when they are tried.
    """
    if capability[0] not in (9, 10):
        return "it is made for compute capability 9 and 10"
    function = importlib.import_module("flash_attn.cute").flash_attn_varlen_func
    if reason := _lacks(function, "page_table", "seqused_k", "window_size"):
        return reason
    accepted = _names(function)
    optional = {"max_seqlen_q", "max_seqlen_k", "learnable_sink", "softcap"} - accepted

    def refuse(layer: AttentionLayer) -> str | None:
        if layer.kv.key_dim > 128 or layer.kv.value_dim > 128:
            return "it reads paged KV of heads up to 128 wide"
        return (
            _refuse_chunks(layer)
            or _refuse_widths(layer, 8)
            or _refuse_lacking(layer, has_softcap="softcap" in accepted)
            or ("it knows no sinks" * (layer.has_sinks and "learnable_sink" in optional) or None)
        )

    def arguments(call: Call) -> dict[str, Any]:
        return {k: v for k, v in arguments_v4(call).items() if k not in optional}

    kinds = _EVERY_KIND - ({RowKind.DECODE} if capability[0] == 9 else set())
    return [Provider("flash-attn 4", function, arguments, refuse, kinds)]


def arguments_v4(call: Call) -> dict[str, Any]:
    """Return what ``flash_attn.cute.flash_attn_varlen_func`` is given."""
    spec, batch = call.spec, call.batch
    return {
        "q": call.query,
        "k": call.keys,
        "v": call.values,
        "cu_seqlens_q": batch.query_starts,
        "seqused_k": batch.context_lens,
        "max_seqlen_q": batch.longest_query,
        "max_seqlen_k": batch.longest_context,
        "page_table": batch.tables,
        "softmax_scale": spec.scaling,
        "causal": True,
        "window_size": (None if spec.window is None else spec.window - 1, 0),
        "softcap": spec.softcap or 0.0,
        # Its kernels read sinks in this type only.
        "learnable_sink": None if spec.sinks is None else spec.sinks.to(torch.bfloat16),
    }


def find_v3(capability: tuple[int, int]) -> list[Provider] | str:
    """Return FlashAttention 3 (``flash_attn_interface``), for compute capability 9."""
    if capability[0] != 9:
        return "it is made for compute capability 9"
    function = importlib.import_module("flash_attn_interface").flash_attn_with_kvcache
    if reason := _lacks(function, "page_table", "cu_seqlens_q", "window_size", "softcap"):
        return reason
    return [Provider("flash-attn 3", function, arguments_v3, refuse_v3)]


def refuse_v3(layer: AttentionLayer) -> str | None:
    """Return what FlashAttention 3 cannot compute of a layer."""
    key_dim, value_dim = layer.kv.key_dim, layer.kv.value_dim
    if key_dim != value_dim and not (128 < key_dim <= 192 and 96 < value_dim <= 128):
        return f"it knows no heads of {key_dim} for K and {value_dim} for V"
    return _refuse_chunks(layer) or _refuse_widths(layer, 8) or _refuse_sinks(layer)


def arguments_v3(call: Call) -> dict[str, Any]:
    """Return what ``flash_attn_interface.flash_attn_with_kvcache`` is given."""
    spec, batch = call.spec, call.batch
    return {
        "q": call.query,
        "k_cache": call.keys,
        "v_cache": call.values,
        "cache_seqlens": batch.context_lens,
        "page_table": batch.tables,
        "cu_seqlens_q": batch.query_starts,
        "max_seqlen_q": batch.longest_query,
        "softmax_scale": spec.scaling,
        "causal": True,
        "window_size": _window(spec),
        "softcap": spec.softcap or 0.0,
    }


def find_v2(capability: tuple[int, int]) -> list[Provider] | str:
    """Return FlashAttention 2 (``flash_attn``), for compute capability 8 and up.

    Over a cache it wants large blocks; prompts without a cached part need none.
    """
    if capability[0] < 8:
        return "it needs compute capability 8 or newer"
    function = importlib.import_module("flash_attn").flash_attn_varlen_func
    if reason := _lacks(function, "window_size"):
        return reason
    accepted = _names(function)

    def refuse(layer: AttentionLayer) -> str | None:
        return _refuse_v2(layer) or _refuse_lacking(layer, has_softcap="softcap" in accepted)

    def paged(call: Call) -> dict[str, Any]:
        given = arguments_v2(call)
        return {k: v for k, v in given.items() if k in accepted or k not in _OPTIONAL_V2}

    def fresh(call: Call) -> dict[str, Any]:
        given = {**paged(call), "k": _dense(call.key), "v": _dense(call.value)}
        return {k: v for k, v in given.items() if k != "block_table"}

    name = "flash-attn 2"
    return _with_fresh(
        Provider(name, function, paged, refuse), fresh, has_pages="block_table" in accepted
    )


def arguments_v2(call: Call) -> dict[str, Any]:
    """Return what ``flash_attn.flash_attn_varlen_func`` is given."""
    spec, batch = call.spec, call.batch
    return {
        "q": call.query,
        "k": call.keys,
        "v": call.values,
        "cu_seqlens_q": batch.query_starts,
        "cu_seqlens_k": batch.context_starts,
        "max_seqlen_q": batch.longest_query,
        "max_seqlen_k": batch.longest_context,
        "softmax_scale": spec.scaling,
        "causal": True,
        "window_size": _window(spec),
        "softcap": spec.softcap or 0.0,
        "block_table": batch.tables,
        # Releases that choose for themselves put the parts of ragged rows in wrong places.
        "num_splits": 1,
    }


def find_torch(capability: tuple[int, int]) -> list[Provider] | str:
    """Return PyTorch's own ``varlen_attn``; not every release takes block tables."""
    if capability[0] < 8:
        return "it needs compute capability 8 or newer"
    function = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    if reason := _lacks(function, "window_size", "scale"):
        return reason
    accepted = _names(function)
    # Somebody may have put FlashAttention 3 or 4 in the place of PyTorch's own kernels.
    current = getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)()
    is_own = current is None

    def refuse(layer: AttentionLayer) -> str | None:
        limits = _refuse_v2(layer) if is_own else refuse_v3(layer)
        return limits or _refuse_lacking(layer, has_softcap=False)

    left_out = {"num_splits"} if not is_own else set()

    def paged(call: Call) -> dict[str, Any]:
        given = arguments_torch(call, takes_context_starts=is_own)
        return {k: v for k, v in given.items() if k in accepted - left_out}

    def fresh(call: Call) -> dict[str, Any]:
        given = {
            **arguments_torch(call, takes_context_starts=True),
            "key": _dense(call.key),
            "value": _dense(call.value),
        }
        unused = left_out | {"block_table", "seqused_k"}
        return {k: v for k, v in given.items() if k in accepted - unused}

    has_pages = {"block_table", "seqused_k"} <= accepted
    return _with_fresh(
        Provider("torch.nn.attention.varlen", function, paged, refuse), fresh, has_pages=has_pages
    )


def _with_fresh(
    paged: Provider, fresh: Callable[[Call], dict[str, Any]], *, has_pages: bool
) -> list[Provider]:
    """Return a provider for prompts without a cached part beside one that reads pages, if it does."""

    def refuse(layer: AttentionLayer) -> str | None:
        # There is no cache whose blocks could be of a wrong size.
        return paged.refuse(layer._replace(block_size=_BLOCK_MULTIPLE_V2))

    alone = replace(paged, arguments=fresh, refuse=refuse, kinds=frozenset({RowKind.FRESH}))
    return [alone, paged] if has_pages else [alone]


def _dense(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def arguments_torch(call: Call, *, takes_context_starts: bool) -> dict[str, Any]:
    """Return what ``torch.nn.attention.varlen.varlen_attn`` is given; a window makes it causal."""
    spec, batch = call.spec, call.batch
    return {
        "query": call.query,
        "key": call.keys,
        "value": call.values,
        "cu_seq_q": batch.query_starts,
        # FlashAttention 3 and 4 refuse them beside a block table.
        "cu_seq_k": batch.context_starts if takes_context_starts else None,
        "max_q": batch.longest_query,
        "max_k": batch.longest_context,
        "scale": spec.scaling,
        "window_size": (-1 if spec.window is None else spec.window - 1, 0),
        "enable_gqa": True,
        "seqused_k": batch.context_lens,
        "block_table": batch.tables,
        # With more, rows after the first go missing: pytorch/pytorch issue 194167.
        "num_splits": 1,
    }


_FINDERS: dict[str, Callable[[tuple[int, int]], list[Provider] | str]] = {
    "flash-attn 3": find_v3,
    "flash-attn 4": find_v4,
    "flash-attn 2": find_v2,
    "torch.nn.attention.varlen": find_torch,
}


def _window(spec: AttentionSpec) -> tuple[int, int]:
    return (-1, -1) if spec.window is None else (spec.window - 1, 0)


def _refuse_v2(layer: AttentionLayer) -> str | None:
    if layer.block_size % _BLOCK_MULTIPLE_V2:
        return f"its blocks are multiples of {_BLOCK_MULTIPLE_V2} tokens, not {layer.block_size}"
    if layer.kv.key_dim != layer.kv.value_dim:
        return "K and V have heads of different sizes"
    return _refuse_chunks(layer) or _refuse_widths(layer, 8) or _refuse_sinks(layer)


def _refuse_chunks(layer: AttentionLayer) -> str | None:
    return None if layer.chunk is None else "it knows no chunks"


def _refuse_sinks(layer: AttentionLayer) -> str | None:
    return "it knows no sinks" if layer.has_sinks else None


def _refuse_lacking(layer: AttentionLayer, *, has_softcap: bool) -> str | None:
    return None if has_softcap or layer.softcap is None else "it knows no softcap"


def _refuse_widths(layer: AttentionLayer, multiple: int) -> str | None:
    widths = (layer.kv.key_dim, layer.kv.value_dim)
    if max(widths) > _WIDEST_HEAD or any(width % multiple for width in widths):
        return f"its heads are multiples of {multiple} and at most {_WIDEST_HEAD} wide"
    return None


def _names(function: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(function).parameters)


def _lacks(function: Callable[..., Any], *needed: str) -> str | None:
    missing = sorted(set(needed) - _names(function))
    return f"this release takes no {', '.join(missing)}" if missing else None
