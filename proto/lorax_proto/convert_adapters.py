"""Adapters' values on the wire and back: ``*_to_proto`` and ``*_from_proto`` pairs."""

from __future__ import annotations

from typing import cast

from lorax_contract.adapters import (
    SOURCES,
    Access,
    AdapterContent,
    AdapterPart,
    AdapterQuery,
    AdapterRef,
    AdapterTiers,
    AdapterUnavailableError,
    Combination,
    FetchedAdapter,
    LoadReport,
    MajoritySign,
    MergeSpec,
    Reason,
    refused,
)
from lorax_contract.step import AdapterHandle
from lorax_proto import generate_pb2 as pb
from lorax_proto.pooled import head_from_proto, head_to_proto


def query_to_proto(query: AdapterQuery) -> pb.DownloadAdapterRequest:
    """Return the request for one adapter; failures are asked for by reason."""
    ref = query.ref
    return pb.DownloadAdapterRequest(
        adapter_parameters=pb.AdapterParameters(adapter_ids=[ref.id]),
        adapter_source=source_to_proto(ref.source),
        api_token=query.token,
        revision=ref.revision,
        refresh=query.refresh,
        explain=True,
        wanted=None if query.wanted is None else fetched_to_proto(query.wanted),
    )


def query_from_proto(message: pb.DownloadAdapterRequest) -> AdapterQuery:
    """Return what is asked for; AdapterUnavailableError for a name that cannot be one."""
    ids = message.adapter_parameters.adapter_ids
    if len(ids) != 1:
        raise refused("DownloadAdapter takes one adapter id at a time")
    revision = message.revision if message.HasField("revision") else None
    return AdapterQuery(
        ref=AdapterRef.of(source_from_proto(message.adapter_source), ids[0], revision),
        token=message.api_token or None,
        refresh=message.refresh,
        wanted=fetched_from_proto(message.wanted) if message.HasField("wanted") else None,
    )


def source_to_proto(source: str) -> pb.AdapterSource:
    """Return the wire's number of a source."""
    if source not in SOURCES:
        raise refused(f"adapter source {source!r} is not known; choose one of {', '.join(SOURCES)}")
    return cast(pb.AdapterSource, pb.AdapterSource.Value(source.upper()))


def source_from_proto(number: pb.AdapterSource) -> str:
    """Return the word for a source; 'pbase', which no server here has, included.

    Raises AdapterUnavailableError for a number that is none.
    """
    try:
        return pb.AdapterSource.Name(number).lower()
    except ValueError:
        raise refused(f"an adapter source of the number {number} is not known") from None


def fetched_to_proto(fetched: FetchedAdapter) -> pb.FetchedAdapter:
    """Return the message for a fetched adapter."""
    return pb.FetchedAdapter(
        version=fetched.version,
        part=part_to_proto(fetched.part),
        disk_bytes=fetched.disk_bytes,
        device_bytes=fetched.device_bytes,
        max_rank=fetched.max_rank,
        vocab_size=fetched.vocab_size,
        access=fetched.access,
        valid_s=fetched.valid_s,
        downloaded=fetched.downloaded,
        stale=fetched.stale,
        timings=[pb.PhaseTime(phase=name, seconds=s) for name, s in fetched.timings.items()],
        text_files=fetched.text_files,
        warnings=fetched.warnings,
        id=fetched.id,
        invocation_ids=fetched.invocation_ids,
        head=None if fetched.head is None else head_to_proto(fetched.head),
    )


def fetched_from_proto(message: pb.FetchedAdapter) -> FetchedAdapter:
    """Return a fetched adapter."""
    return FetchedAdapter(
        version=message.version,
        part=part_from_proto(message.part),
        disk_bytes=message.disk_bytes,
        device_bytes=message.device_bytes,
        max_rank=message.max_rank,
        vocab_size=message.vocab_size,
        access=cast(Access, message.access),
        valid_s=message.valid_s,
        downloaded=message.downloaded,
        stale=message.stale,
        timings={each.phase: each.seconds for each in message.timings},
        text_files=tuple(message.text_files),
        warnings=tuple(message.warnings),
        id=message.id if message.HasField("id") else None,
        invocation_ids=tuple(message.invocation_ids),
        head=head_from_proto(message.head) if message.HasField("head") else None,
    )


def failure_to_proto(error: AdapterUnavailableError) -> pb.AdapterFailure:
    """Return the message for a failure; its detail stays in this process's log."""
    return pb.AdapterFailure(
        reason=error.reason.value, text=error.text, retry_after_s=error.retry_after_s
    )


def failure_from_proto(message: pb.AdapterFailure) -> AdapterUnavailableError:
    """Return the error of a failure."""
    return AdapterUnavailableError(
        Reason(message.reason),
        message.text,
        retry_after_s=message.retry_after_s if message.HasField("retry_after_s") else None,
    )


def part_to_proto(part: AdapterPart) -> pb.AdapterPart:
    """Return the message for a part."""
    return pb.AdapterPart(content_digest=part.content_digest, store_digest=part.store_digest)


def part_from_proto(message: pb.AdapterPart) -> AdapterPart:
    """Return a part."""
    return AdapterPart(message.content_digest, message.store_digest)


def content_to_proto(content: AdapterContent) -> pb.AdapterContent:
    """Return the message for a content."""
    merge = content.merge
    return pb.AdapterContent(
        parts=[part_to_proto(part) for part in content.parts],
        merge=None
        if merge is None
        else pb.AdapterMerge(
            weights=merge.weights,
            combination=merge.combination.value,
            density=merge.density,
            majority_sign=merge.majority_sign.value,
        ),
    )


def content_from_proto(message: pb.AdapterContent) -> AdapterContent:
    """Return a content; ValueError or ValidationError when it is none."""
    merge = None
    if message.HasField("merge"):
        merge = MergeSpec(
            weights=tuple(message.merge.weights),
            combination=Combination(message.merge.combination),
            density=message.merge.density if message.merge.HasField("density") else None,
            majority_sign=MajoritySign(message.merge.majority_sign),
        )
    parts = tuple(part_from_proto(part) for part in message.parts)
    if len(parts) != (1 if merge is None else len(merge.weights)):
        raise ValueError("a content has one part, or one for each weight of its merge")
    return AdapterContent(parts=parts, merge=merge)


def load_from_proto(message: pb.LoadAdapterResponse) -> LoadReport:
    """Return what preparing took; raises the failure that the message holds."""
    if message.HasField("failure"):
        raise failure_from_proto(message.failure)
    return LoadReport(
        device_bytes=message.device_bytes, parse_s=message.parse_s, copy_s=message.copy_s
    )


def tiers_to_proto(tiers: AdapterTiers) -> pb.AdapterTiers:
    """Return the message for where adapters lie."""
    return pb.AdapterTiers(
        device=[
            pb.TierEntry(adapter_index=handle, digest=key, bytes=size)
            for handle, (key, size) in tiers.device.items()
        ],
        host=[pb.TierEntry(digest=digest, bytes=size) for digest, size in tiers.host.items()],
        disk=[pb.TierEntry(digest=digest, bytes=size) for digest, size in tiers.disk.items()],
    )


def tiers_from_proto(message: pb.AdapterTiers) -> AdapterTiers:
    """Return where adapters lie."""
    return AdapterTiers(
        device={
            AdapterHandle(each.adapter_index): (each.digest, each.bytes) for each in message.device
        },
        host={each.digest: each.bytes for each in message.host},
        disk={each.digest: each.bytes for each in message.disk},
    )
