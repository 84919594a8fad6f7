"""Adapters from S3 and what speaks like it. Needs the extra ``s3`` (boto3).

Access is the server's own: credentials come from boto3's usual places, and only below the
allowed roots, so a request cannot make the server read any other bucket it has access to.
"""

from __future__ import annotations

import re
from pathlib import Path

from lorax_contract.adapters import AdapterRef, AdapterUnavailableError, Reason, key_of, refused
from lorax_shard.adapter_files import StoredFile
from lorax_shard.fetching.sources.interface import (
    FetchContext,
    Resolved,
    SourceSettings,
    not_found,
    select_files,
)
from lorax_shard.fetching.sources.objects import S3Objects, split_place
from lorax_shard.fetching.sources.stream import download, retried

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")


class S3Source:
    """Prefixes of buckets below the allowed roots."""

    def __init__(self, settings: SourceSettings) -> None:
        self._roots = tuple(split_place(root) for root in settings.s3_roots)
        self._endpoint = settings.s3_endpoint
        self._offline = settings.offline
        self._objects = S3Objects(settings.s3_endpoint)

    @property
    def realm(self) -> str:
        """Which of these places it is."""
        return self._endpoint or ""

    def resolve(self, ref: AdapterRef, token: str | None, context: FetchContext) -> Resolved:
        """Return a version made of the objects' keys, entity tags and sizes."""
        bucket, prefix = self._place(ref)
        what = f"adapter {ref}"
        objects = retried(
            what, lambda: self._objects.below(what, bucket, prefix, context.limits), context
        )
        if not objects:
            raise not_found(ref, "is an empty prefix: there is no such folder in the bucket")
        files = tuple(objects[name] for name in select_files(ref, objects))
        version = key_of(bucket, prefix, *(f"{f.name} {f.size} {f.locator}" for f in files))
        return Resolved(version=version, files=files)

    def fetch(
        self, ref: AdapterRef, resolved: Resolved, folder: Path, context: FetchContext
    ) -> tuple[StoredFile, ...]:
        """Download the objects; one that was replaced since it was listed ends the fetch."""
        what, (bucket, prefix) = f"adapter {ref}", split_place(ref.id)
        return tuple(
            download(
                what,
                file,
                folder,
                self._objects.opener(what, bucket, f"{prefix}/{file.name}", file, context.limits),
                context,
            )
            for file in resolved.files
        )

    def _place(self, ref: AdapterRef) -> tuple[str, str]:
        if not self._roots:
            raise refused(
                f"adapter {ref}: this server takes no adapters from S3; its operator allows a "
                "prefix with --adapter-s3-root"
            )
        if ref.revision is not None:
            raise refused(f"adapter {ref}: prefixes of S3 have no revisions")
        bucket, prefix = split_place(ref.id)
        if not _BUCKET.fullmatch(bucket) or not prefix or ".." in prefix.split("/"):
            raise refused(f"adapter {ref} is not named like s3://bucket/prefix")
        for root_bucket, root_prefix in self._roots:
            below = not root_prefix or f"{prefix}/".startswith(f"{root_prefix}/")
            if below and root_bucket in ("", bucket):
                break
        else:
            raise refused(f"adapter {ref} leads outside the prefixes that this server may read")
        if self._offline:
            raise AdapterUnavailableError(
                Reason.OFFLINE, f"adapter {ref} is not in the store and the network is switched off"
            )
        return bucket, prefix
