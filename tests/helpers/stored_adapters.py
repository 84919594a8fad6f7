"""Adapters in a store as the fetcher's process leaves them there: files, verdict, normal form."""

from __future__ import annotations

from pathlib import Path

from lorax_contract.adapters import AdapterPart, AdapterRef
from lorax_shard.fetching.job import FetchJob, VerifySettings
from lorax_shard.fetching.sources.interface import FetchContext, FetchLimits, SourceSettings
from lorax_shard.fetching.sources.local import LocalSource
from lorax_shard.peft.base import BaseDescription
from lorax_shard.peft.context import make_context
from lorax_shard.peft.files import AdapterLimits
from lorax_shard.store.store import AdapterStore


def put_adapter(
    store: AdapterStore, folder: Path, base: BaseDescription, limits: AdapterLimits | None = None
) -> AdapterPart:
    """Fetch an adapter's folder into the store, verified; return what names it there."""
    settings = VerifySettings(
        function="lorax_shard.peft.verify:verify",
        context=make_context(base, limits or AdapterLimits()),
    )
    source = LocalSource(SourceSettings(local_roots=(str(folder.parent),)))
    context = FetchContext(limits=FetchLimits(), deadline=float("inf"))
    job = FetchJob(store, source, context, settings.load())
    outcome = job.run(AdapterRef.of("local", folder.name), None)
    return AdapterPart(outcome.facts["content_digest"], outcome.digest)
