"""The interface of attention backends, and what every layer of a step is told.

Shapes in this folder: T tokens of a step, R rows, H query heads, G KV heads,
D head dim of K, E head dim of V, L KV tokens a row sees.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from lorax_shard.attention.kv_cache import NO_SLOT, KVShape, PagedCache


class RelativeBias(NamedTuple):
    """What scores have besides, by how far a key lies behind its query: 1 - N to N - 1 tokens.

    score(i, j) += by_distance[h, d] + of_query[h, i, places[d]] + of_key[h, j, places[d]]
                 + scaling * (q_i . key_table[h, :, places[d]] + k_j . query_table[h, :, places[d]])

    with d = N - 1 + j - i; i and j are tokens of one row, of up to N. Of the parts those that are None
    add nothing; ``places`` are there if what the tokens themselves add is. Tables are for backends
    that say so, in place of what is made of tokens by them; places then never grow with d.
    """

    by_distance: torch.Tensor | None = None  # H x 2N - 1
    places: torch.Tensor | None = None  # 2N - 1, int32
    of_query: torch.Tensor | None = None  # H x T x B, of all tokens of the step
    of_key: torch.Tensor | None = None  # H x T x B
    key_table: torch.Tensor | None = None  # H x D x B
    query_table: torch.Tensor | None = None  # H x D x B


class AttentionSpec(NamedTuple):
    """What one layer computes.

    score(q, k) = cap(scaling * q.k), with cap(x) = softcap * tanh(x / softcap) when
    a softcap is set. A query at position p sees the keys at p - window < position
    <= p, with a chunk only those of its own one: position // chunk = p // chunk. Each
    head's sink is one more score without a value. Rows that a step has whole may have a bias.
    """

    scaling: float
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None  # H
    chunk: int | None = None
    bias: RelativeBias | None = None

    def first_seen(self, position: int) -> int:
        """Return the first position that a query at ``position`` sees."""
        first = 0 if self.window is None else max(0, position - self.window + 1)
        return first if self.chunk is None else max(first, position - position % self.chunk)


class AttentionLayer(NamedTuple):
    """What a layer asks of a backend before its first step, without its weights.

    Layers that are alike are equal.
    """

    num_heads: int
    kv: KVShape
    block_size: int
    window: int | None = None
    chunk: int | None = None
    softcap: float | None = None
    has_sinks: bool = False

    @classmethod
    def of(
        cls, spec: AttentionSpec, num_heads: int, kv: KVShape, block_size: int
    ) -> AttentionLayer:
        """Return what a layer asks that computes ``spec`` over blocks of ``block_size`` tokens."""
        has_sinks = spec.sinks is not None
        return cls(num_heads, kv, block_size, spec.window, spec.chunk, spec.softcap, has_sinks)


@dataclass(slots=True)
class StepMetadata:
    """One step of R rows and T tokens, all concatenated without padding.

    Rows with one query token come first (``num_decode_rows`` of them), so that a
    backend can take them together. Each row attends to its own sequence only:
    query i of a row sits at position ``context_len - query_len + i`` and sees the
    KV of positions up to its own. The step's new K and V are written to ``slots``
    before anything is read.
    """

    query_lens: list[int]  # R; tokens each row computes
    context_lens: list[int]  # R; KV length of each row after the step
    slots: torch.Tensor  # T int64; block * block_size + offset of each token, or NO_SLOT
    block_tables: torch.Tensor  # R x max_blocks int64; padded with a valid block
    num_decode_rows: int
    cache: PagedCache
    backend: AttentionBackend
    # Values a backend computes in the first layer and reuses in the others.
    scratch: dict[str, Any] = field(default_factory=dict)

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Write K and V to the tokens' slots, in plain operations; what has none is left out."""
        if "stored" not in self.scratch:
            has_slot = self.slots != NO_SLOT
            self.scratch["stored"] = None if bool(has_slot.all()) else has_slot.nonzero()[:, 0]
        stored: torch.Tensor | None = self.scratch["stored"]
        if stored is None:
            self.cache.write(layer, key, value, self.slots)
        else:
            self.cache.write(layer, key[stored], value[stored], self.slots[stored])


class FixedDecodes(ABC):
    """Decode steps whose launches follow from the number of rows alone, for graphs.

    All else is read on the device, from tensors that stay where they are.
    """

    # Computes them.
    backend: AttentionBackend
    # The shapes of int32 numbers that are told of each step beside lengths and tables, by name.
    shapes: Mapping[str, tuple[int, ...]]

    @abstractmethod
    def fill(
        self, numbers: Mapping[str, NDArray[np.int32]], context_lens: NDArray[np.int64]
    ) -> None:
        """Write the numbers of a step; a length of 0: the row is padding."""

    @abstractmethod
    def scratch(
        self,
        num_rows: int,
        context_lens: torch.Tensor,  # rows or more, int32
        tables: torch.Tensor,  # rows or more x width, int32
        numbers: Mapping[str, torch.Tensor],
    ) -> dict[str, Any]:
        """Return what a step of so many rows keeps in its metadata, over these tensors."""


class ReusableRows(ABC):
    """What kernels are told of a step's rows, where it can be told again of another step.

    What was asked of kernels for one step they then compute for the other.
    """

    @abstractmethod
    def fill(
        self, query_lens: Sequence[int], context_lens: Sequence[int], block_tables: torch.Tensor
    ) -> None:
        """Tell of a step; the tables (R x width int64) are read where they lie."""

    @abstractmethod
    def narrow(
        self,
        rows: NDArray[np.int64],
        query_lens: NDArray[np.int64],
        positions: NDArray[np.int64],
    ) -> None:
        """Tell of some tokens alone of the step that was told last, whose K and V are there.

        They are runs of neighbours: of which row, of how many tokens, from which position on.
        """

    @abstractmethod
    def scratch(self) -> dict[str, Any]:
        """Return what the metadata of a step over these rows keeps."""


class AttentionBackend(ABC):
    """Stores a step's K and V and attends over the paged cache; stateless between steps."""

    name: ClassVar[str]
    # Whether ``supports`` refuses some layers.
    is_partial: ClassVar[bool] = False
    # Whether it takes the tables of a ``RelativeBias``.
    takes_tables: ClassVar[bool] = False

    @classmethod
    def probe(cls, device: torch.device, dtype: torch.dtype) -> str | None:  # noqa: ARG003 - plain torch runs everywhere
        """Return in words why this backend cannot run here, or None when it can."""
        return None

    @classmethod
    def supports(
        cls,
        layer: AttentionLayer,  # noqa: ARG003 - most backends compute whatever a spec says
        device: torch.device,  # noqa: ARG003
        dtype: torch.dtype,  # noqa: ARG003
    ) -> str | None:
        """Return in words what of a layer this backend cannot compute, or None."""
        return None

    @classmethod
    def refuses_cache(cls, kv_dtype: torch.dtype, device: torch.device) -> str | None:  # noqa: ARG003 - most read their own only
        """Return in words why it cannot read a cache narrower than the queries, or None."""
        return "it reads K and V in the dtype that it computes in"

    @abstractmethod
    def attend(
        self,
        query: torch.Tensor,  # T x H x D
        key: torch.Tensor,  # T x G x D, already stored
        value: torch.Tensor,  # T x G x E, already stored
        layer: int,
        spec: AttentionSpec,
        metadata: StepMetadata,
    ) -> torch.Tensor:  # T x H x E
        """Return softmax(scores) @ V of each query over its own sequence."""

    def warm_up(  # noqa: B027 - where nothing is compiled there is nothing to do
        self,
        layer: AttentionLayer,
        device: torch.device,
        dtype: torch.dtype,
        kv_dtype: torch.dtype,
    ) -> None:
        """Compile whatever a step may ask for such a layer over a cache in ``kv_dtype``."""

    def fixed_decodes(
        self,
        layers: Sequence[AttentionLayer],
        max_rows: int,
        device: torch.device,
    ) -> FixedDecodes | None:
        """Return how decode steps of up to ``max_rows`` are captured in graphs; None: they cannot be."""
        return None

    def reusable_rows(self) -> ReusableRows | None:
        """Return rows for steps that are noted once and computed again; None: they cannot be."""
        return None

    def store(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        layer: int,
        metadata: StepMetadata,
    ) -> None:
        """Write the step's K and V to its slots; a token whose slot is NO_SLOT is left out."""
        metadata.write(layer, key, value)
