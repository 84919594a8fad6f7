"""What the server tells about itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryInfo:
    """What the devices' memory goes to: bytes by name, a table for each rank."""

    # The one that bounds the number of KV blocks.
    fullest_rank: int
    ranks: tuple[dict[str, int], ...]

    @classmethod
    def of(cls, ranks: Sequence[Sequence[tuple[str, int]]]) -> MemoryInfo | None:
        """Return what the ranks said; None if they said nothing."""
        tables = tuple(dict(rank) for rank in ranks)
        if not any(tables):
            return None
        spare = [table.get("unused", 0) for table in tables]
        return cls(fullest_rank=spare.index(min(spare)), ranks=tables)


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendsInfo:
    """What a shard computes with, by name."""

    attention: str
    linear: str
    elementwise: str
    # None: no adapters are served.
    lora: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerInfo:
    """The answer of ``/info``: LoRAX's keys under LoRAX's names, ``memory`` and ``backends``."""

    model_id: str
    model_sha: str | None
    model_dtype: str
    model_device_type: str
    model_pipeline_tag: str | None = None
    max_concurrent_requests: int
    max_best_of: int
    max_stop_sequences: int
    max_input_length: int
    max_total_tokens: int
    waiting_served_ratio: float
    max_batch_total_tokens: int
    max_waiting_tokens: int
    validation_workers: int
    eager_prefill: bool
    version: str
    sha: str | None = None
    docker_label: str | None = None
    request_logger_url: str | None = None
    # TEI's word for it, with what it says of each; None: it generates, or classifies tokens.
    model_type: dict[str, dict[str, Any]] | None = None
    # Texts of one call, and what becomes of those that are too long where a call does not say.
    max_client_batch_size: int = 2048
    auto_truncate: bool = False
    # What the base model is mainly for, by the names of ``--task``.
    task: str = "generate"
    # Of generate, embed and classify, those that the base model does.
    tasks: tuple[str, ...] = ("generate", "embed")
    # What its classification head tells apart; None: it has none.
    labels: tuple[str, ...] | None = None
    memory: MemoryInfo | None = None
    backends: BackendsInfo
