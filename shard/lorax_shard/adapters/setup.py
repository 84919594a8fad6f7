"""Makes a rank's adapter parts from its configuration and its environment."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from lorax_contract.adapters import AdapterUnavailableError
from lorax_contract.config import ShardConfig
from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_shard.adapters.copies.copier import EntryCopier
from lorax_shard.adapters.copies.pieces import EntryReader
from lorax_shard.adapters.host_cache import HostCache
from lorax_shard.adapters.prepare_lane import DevicePreparer, PrepareLane
from lorax_shard.adapters.rank_adapters import RankAdapters
from lorax_shard.fetching.client import AdapterFetcher, FetchSettings
from lorax_shard.fetching.job import VerifySettings
from lorax_shard.fetching.limits import ProcessLimits
from lorax_shard.fetching.process import Setup
from lorax_shard.fetching.sources.environment import source_settings
from lorax_shard.peft.base import BaseDescription
from lorax_shard.peft.context import make_context
from lorax_shard.peft.files import AdapterLimits
from lorax_shard.store.store import AdapterStore

_VERIFY = "lorax_shard.peft.verify:verify"


def make_store(config: ShardConfig) -> AdapterStore:
    """Open the store that all ranks of this host share; StartupError if it cannot be written."""
    folder = Path(config.adapter_store_dir)
    try:
        store = AdapterStore(folder, max_bytes=config.adapter_store_bytes)
        store.open()
    except OSError as error:
        reason = os.strerror(error.errno).lower() if error.errno else str(error)
        raise StartupError(
            f"the adapter store in {folder} cannot be written: {reason}. Give this user access "
            "to it, name another folder with --adapter-store-dir, or serve no adapters with "
            "--adapter-memory-fraction 0",
            ExitCode.FOLDER_UNUSABLE,
        ) from error
    except AdapterUnavailableError as error:
        raise StartupError(f"{error.text} ({folder})", ExitCode.FOLDER_UNUSABLE) from error
    return store


def make_host_cache(config: ShardConfig, store: AdapterStore) -> HostCache:
    """Return an empty cache over the store."""
    return HostCache(
        store, host_bytes=config.adapter_host_bytes, patience_s=config.adapter_timeout_s
    )


def make_prepare_lane(
    config: ShardConfig, host: HostCache, preparer: DevicePreparer, dtype: torch.dtype
) -> PrepareLane:
    """Return an empty lane."""
    return PrepareLane(
        host,
        preparer,
        dtype=dtype,
        # PEFT computes in float32. On a CPU numbers are widened as they are read, or before; on a
        # GPU half the bytes are worth more than the last digits.
        low_rank_dtype=None if config.device == "cpu" else dtype,
    )


def make_rank_adapters(
    config: ShardConfig,
    store: AdapterStore,
    host: HostCache,
    lane: PrepareLane,
    base: BaseDescription,
    rank_zero: EntryReader | None = None,
) -> RankAdapters:
    """Return the rank's own; rank 0 fetches for all of its host. Called in the server's event loop.

    ``rank_zero`` gives a rank with a store of its own what rank 0 has.
    """
    fetcher = None
    if config.fetches:
        tokenizer = Path(config.tokenizer_dir or config.model_dir, "tokenizer.json")
        known = tokenizer if tokenizer.is_file() else None
        context = make_context(base, limits_of(config), config.model_id, known)
        setup = fetch_setup(config, context)
        fetcher = AdapterFetcher(
            FetchSettings(
                setup=setup,
                concurrency=config.adapter_concurrency,
                valid_s=config.adapter_refresh_s,
            )
        )
    copier = None
    if rank_zero is not None:
        copier = EntryCopier(store, rank_zero, deadline_s=config.adapter_timeout_s)
    return RankAdapters(lane, host, store, fetcher, copier)


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


def limits_of(config: ShardConfig) -> AdapterLimits:
    """Return what an adapter may be at most."""
    return AdapterLimits(max_rank=config.max_adapter_rank)
