"""The adapter of ``--merge-adapter-weights``: fetched into the store before a shard loads it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from lorax_contract.adapters import AdapterRef
from lorax_contract.errors import LoraxError, StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_shard.fetching.job import FetchJob, make_source
from lorax_shard.fetching.sources.interface import FetchContext, FetchLimits, SourceSettings
from lorax_shard.fetching.sources.stream import disk_errors
from lorax_shard.prepare.files import Progress, ProgressEvent
from lorax_shard.prepare.hub import hub_token
from lorax_shard.store.store import AdapterStore


@dataclass(frozen=True, slots=True, kw_only=True)
class MergedAdapter:
    """Which adapter becomes part of the weights, and where it comes from and goes to."""

    adapter_id: str
    source: str
    sources: SourceSettings
    store_dir: Path
    store_bytes: int
    timeout_s: float


def fetch_adapter(selection: MergedAdapter, progress: Progress) -> Path:
    """Return the adapter's folder in the store; StartupError says why it cannot be had.

    It is the operator's own, so it is fetched in this process, with the operator's token.
    Its tensors are looked at when they are merged.
    """
    arrived = 0

    def report(count: int) -> None:
        nonlocal arrived
        arrived += count
        progress(ProgressEvent("fetching the adapter", arrived, None, "B"))

    limits = FetchLimits()
    context = FetchContext(
        limits=limits, deadline=time.monotonic() + selection.timeout_s, on_bytes=report
    )
    try:
        ref = AdapterRef.of(selection.source, selection.adapter_id)
        source = make_source(ref.source, selection.sources)
        store = AdapterStore(selection.store_dir, max_bytes=selection.store_bytes)
        with disk_errors(f"adapter {ref}", "what is read from it", limits.max_file_bytes):
            outcome = FetchJob(store, source, context).run(ref, hub_token())
    except LoraxError as error:
        raise _unusable(str(error)) from error
    except OSError as error:
        raise _unusable(
            f"the adapter store in {selection.store_dir} cannot be used: {error}"
        ) from error
    entry = store.entry(outcome.digest)
    if entry is None:
        raise _unusable("another process removed it from the adapter store; start again")
    return entry.folder


def _unusable(reason: str) -> StartupError:
    return StartupError(
        f"--merge-adapter-weights: the adapter cannot be had: {reason}", ExitCode.ADAPTER_UNUSABLE
    )
