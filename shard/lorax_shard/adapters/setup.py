"""Makes a rank's adapter parts from its configuration and its environment."""

from __future__ import annotations

from pathlib import Path

import torch

from lorax_contract.config import ShardConfig
from lorax_shard.adapters.fetch_job import VerifySettings
from lorax_shard.adapters.fetch_limits import ProcessLimits
from lorax_shard.adapters.fetch_process import Setup
from lorax_shard.adapters.fetcher import AdapterFetcher, FetchSettings
from lorax_shard.adapters.host_base import BaseDescription
from lorax_shard.adapters.peft_files import Limits
from lorax_shard.adapters.peft_verify import make_context
from lorax_shard.adapters.room import AdapterRoom
from lorax_shard.adapters.shelf import AdapterShelf, Preparer
from lorax_shard.adapters.source_environment import source_settings
from lorax_shard.adapters.store import AdapterStore

_VERIFY = "lorax_shard.adapters.peft_verify:verify"


def make_store(config: ShardConfig) -> AdapterStore:
    """Open the store that all ranks of this host share."""
    return AdapterStore(Path(config.adapter_store_dir), max_bytes=config.adapter_store_bytes)


def make_shelf(
    config: ShardConfig,
    store: AdapterStore,
    base: BaseDescription,
    preparer: Preparer,
    dtype: torch.dtype,
) -> AdapterShelf:
    """Return an empty shelf."""
    return AdapterShelf(
        store,
        base,
        limits_of(config),
        preparer,
        host_bytes=config.adapter_host_bytes,
        dtype=dtype,
        # As PEFT has it on a CPU; on a GPU half the bytes are worth more than its last digits.
        low_rank_dtype=torch.float32 if config.device == "cpu" else dtype,
    )


def make_room(
    config: ShardConfig, store: AdapterStore, shelf: AdapterShelf, base: BaseDescription
) -> AdapterRoom:
    """Return the rank's room; rank 0 fetches for all. Called in the server's event loop."""
    fetcher = None
    if config.rank == 0:
        setup = fetch_setup(config, make_context(base, limits_of(config)))
        fetcher = AdapterFetcher(
            FetchSettings(
                setup=setup,
                concurrency=config.adapter_concurrency,
                refresh_interval_s=config.adapter_refresh_s,
                acceptance_s=config.adapter_refresh_s,
            )
        )
    return AdapterRoom(shelf, store, fetcher)


def fetch_setup(config: ShardConfig, context: dict[str, str]) -> Setup:
    """Return what the fetcher's processes are told."""
    return Setup(
        store_dir=config.adapter_store_dir,
        store_max_bytes=config.adapter_store_bytes,
        sources=source_settings(
            config.adapter_local_roots, config.adapter_s3_roots, config.s3_endpoint
        ),
        process=ProcessLimits(deadline_s=config.adapter_timeout_s),
        verify=VerifySettings(function=_VERIFY, context=context),
    )


def limits_of(config: ShardConfig) -> Limits:
    """Return what an adapter may be at most."""
    return Limits(max_rank=config.max_adapter_rank)
