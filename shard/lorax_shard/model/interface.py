"""What the engine needs of a model; knows neither transformers nor proto."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from lorax_contract.pooling import HeadFacts
from lorax_shard.attention.backend import StepMetadata

IdArray = NDArray[np.int64]

# The kinds of heads: one gives scores to a whole text, one to each token.
SEQUENCE, TOKENS = "sequence", "tokens"


class UnreadIds(NamedTuple):
    """Ids that only a device knows yet: those of the tokens ``at`` are ``drawn[of]``."""

    drawn: torch.Tensor  # int64; below 0: nothing was drawn, and what comes of it is nobody's
    at: IdArray
    of: IdArray


class PassNumbers(NamedTuple):
    """What one forward pass computes: R rows of T tokens without padding, as numbers on the host.

    Rows of one token come first. Of S tokens the logits are asked for.
    """

    input_ids: IdArray  # T
    positions: IdArray  # T
    # Where in the cache the K and V of each token come: block * block_size + offset.
    kv_slots: IdArray  # T
    tables: IdArray  # R x width, padded with a valid block
    query_lens: list[int]  # R
    context_lens: list[int]  # R; with the tokens of this pass
    num_decode_rows: int
    logit_rows: IdArray  # S indices into T
    # Of each run of tokens: the slot of its adapter, None for the base model; and its length. A row
    # is one run, or two where its adapter begins to act inside it.
    slots: list[int | None]
    slot_lens: list[int]
    unread: UnreadIds | None = None
    # Of each token which of two texts it belongs to, 0 or 1; None: there is one.
    segments: IdArray | None = None  # T


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphSettings:
    """What graphs of decode steps have room for."""

    max_rows: int
    # Tokens of a row's context.
    max_context: int
    # Of adapters; 0: steps with adapters have no graphs.
    max_rank: int = 0
    # Adapters in effect at once.
    max_slots: int = 0


@dataclass(slots=True)
class HiddenStates:
    """What the last layer gave in a forward pass, before the head."""

    states: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # T x hidden


class PassGraphs(Protocol):
    """Passes that were captured, to be computed without launching what they consist of."""

    def run(self, numbers: PassNumbers) -> torch.Tensor | None:
        """Return the logits of a pass (S x vocab float32); None: it is not captured.

        They are overwritten by the next run.
        """

    def run_with_states(
        self, numbers: PassNumbers, tokens: IdArray
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return what the last layer gives for some tokens (n x hidden), too, behind the logits.

        ``tokens`` are n indices into T, each once.
        """


class AdapterSlots(Protocol):
    """The model's slots; they change between steps only."""

    @property
    def sites(self) -> Mapping[str, Any]:
        """The places that adapters can change, by name."""

    @property
    def slots(self) -> Mapping[int, str]:
        """The loaded slots, and the digests of what they hold."""

    def load(self, slot: int, adapter: Any) -> None:
        """Put a prepared adapter into an empty slot."""

    def unload(self, slot: int) -> None:
        """Empty a slot."""


class PagedModel(Protocol):
    """A decoder whose attention reads and writes a paged KV cache, or an encoder."""

    # Whether each token sees all others, so that rows are computed whole.
    is_encoder: bool
    # Whether it draws tokens; else it gives hidden states in place of logits.
    generates: bool
    model_type: str
    vocab_size: int
    # Ids that end a text: generation_config's list where there is one.
    eos_token_ids: frozenset[int]
    # Longest sequence the positions allow; 0: unbounded.
    max_positions: int
    window_size: int | None
    dtype: torch.dtype
    device: torch.device
    weight_bytes: int
    # The names of the backends in use.
    attention_backend: str
    linear_backend: str
    elementwise_backend: str
    lora_backend: str

    @property
    def graphs(self) -> PassGraphs | None:
        """None: every pass is launched kernel by kernel."""

    @property
    def slots(self) -> AdapterSlots | None:
        """Where adapters take effect; None: the model has no place for them."""

    def block_bytes(self, block_size: int) -> int:
        """Return the bytes that one KV block takes over all layers."""

    def allocate_cache(self, num_blocks: int, block_size: int) -> None:
        """Make the KV pool; a second call replaces it."""

    def free_cache(self) -> None:
        """Give the KV pool back."""

    def graph_bytes(self, settings: GraphSettings) -> int:
        """Return about how many bytes graphs of the pool at hand, or of another, will take."""

    def capture_graphs(self, settings: GraphSettings) -> None:
        """Capture steps over the pool as far as that is possible; ``graphs`` computes them from now on."""

    def copy_blocks(self, source: list[int], destination: list[int]) -> None:
        """Copy KV blocks within the pool, over all layers."""

    def allocate_swap_space(self, num_blocks: int) -> float:
        """Make host memory for blocks beside the empty pool; 0: give it back.

        Returns the seconds that a block takes to it or from it.
        """

    def swap_out(self, blocks: list[int], host_blocks: list[int]) -> None:
        """Copy KV blocks of the pool to host blocks, over all layers."""

    def swap_in(self, host_blocks: list[int], blocks: list[int]) -> None:
        """Copy host blocks to KV blocks of the pool, over all layers."""

    def head(self, kind: str) -> HeadFacts | None:
        """Return what the model's own head of a kind says; None: it has none."""

    def score(
        self, kind: str, states: Sequence[torch.Tensor], slots: Sequence[int | None]
    ) -> list[torch.Tensor]:
        """Return what heads of a kind make of hidden states: n x hidden becomes n x labels."""

    def keeping_hidden(self) -> AbstractContextManager[HiddenStates]:
        """Within, what the last layer gives in ``forward`` is kept, for all tokens."""

    def make_metadata(
        self,
        query_lens: list[int],
        context_lens: list[int],
        slots: torch.Tensor,
        block_tables: torch.Tensor,
        num_decode_rows: int,
    ) -> StepMetadata:
        """Return the metadata of a step over this model's cache and backend."""

    def forward(
        self,
        input_ids: torch.Tensor,  # T int64
        positions: torch.Tensor,  # T int64
        metadata: StepMetadata,
        logit_rows: torch.Tensor,  # S int64 on the host, indices into T; the head computes these only
        slots: Sequence[int | None] = (),
        slot_lens: Sequence[int] | None = None,
        segments: torch.Tensor | None = None,  # T int64: which of two texts, 0 or 1
    ) -> torch.Tensor:  # S x vocab float32
        """Compute one ragged step: write its KV, return logits of the asked tokens.

        The next ``slot_lens[i]`` tokens (None: row i) compute with the adapter in ``slots[i]``,
        with none if that is None. Logits are
        as wide as the widest vocabulary among the rows; what a row lacks is -inf.
        """
