"""Adapters from S3 and what speaks like it. Needs the extra ``s3`` (boto3).

Access is the server's own: credentials come from boto3's usual places, and only below the
allowed roots, so a request cannot make the server read any other bucket it has access to.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorax_contract.adapters import AdapterRef, AdapterUnavailableError, Reason, key_of, refused
from lorax_shard.adapter_files import StoredFile
from lorax_shard.fetching.sources.interface import (
    FetchContext,
    RemoteFile,
    Resolved,
    SourceSettings,
    not_found,
    select_files,
    transient,
)
from lorax_shard.fetching.sources.stream import Broken, Opened, Opener, download, retried

_SCHEME = "s3://"
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_CHUNK_BYTES = 1 << 20
# Far more objects than an adapter's folder has.
_MAX_OBJECTS = 1000


class S3Source:
    """Prefixes of buckets below the allowed roots."""

    def __init__(self, settings: SourceSettings) -> None:
        self._roots = tuple(_split(root) for root in settings.s3_roots)
        self._endpoint = settings.s3_endpoint
        self._offline = settings.offline
        self._client: Any = None

    @property
    def realm(self) -> str:
        """Which of these places it is."""
        return self._endpoint or ""

    def resolve(self, ref: AdapterRef, token: str | None, context: FetchContext) -> Resolved:
        """Return a version made of the objects' keys, entity tags and sizes."""
        bucket, prefix = self._place(ref)
        objects = retried(ref, lambda: self._objects(ref, bucket, prefix, context), context)
        if not objects:
            raise not_found(ref, "is an empty prefix: there is no such folder in the bucket")
        files = tuple(
            RemoteFile(name=name, size=objects[name][0], locator=objects[name][1])
            for name in select_files(ref, objects)
        )
        version = key_of(bucket, prefix, *(f"{f.name} {f.size} {f.locator}" for f in files))
        return Resolved(version=version, files=files)

    def fetch(
        self, ref: AdapterRef, resolved: Resolved, folder: Path, context: FetchContext
    ) -> tuple[StoredFile, ...]:
        """Download the objects; one that was replaced since it was listed ends the fetch."""
        return tuple(
            download(ref, file, folder, self._opener(ref, file, context), context)
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
        bucket, prefix = _split(ref.id)
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

    def _objects(
        self, ref: AdapterRef, bucket: str, prefix: str, context: FetchContext
    ) -> dict[str, tuple[int, str]]:
        """Return size and entity tag of the objects directly below ``prefix``, by name."""
        client = self._connected(ref, context)
        with _errors(ref):
            answer = client.list_objects_v2(
                Bucket=bucket, Prefix=f"{prefix}/", Delimiter="/", MaxKeys=_MAX_OBJECTS
            )
        return {
            item["Key"].removeprefix(f"{prefix}/"): (int(item["Size"]), str(item["ETag"]))
            for item in answer.get("Contents", [])
        }

    def _opener(self, ref: AdapterRef, file: RemoteFile, context: FetchContext) -> Opener:
        bucket, prefix = _split(ref.id)
        client = self._connected(ref, context)

        @contextlib.contextmanager
        def opener(start: int) -> Iterator[Opened]:
            if start and start == file.size:
                yield Opened(start=start, total=start, chunks=iter(()))
                return
            part = {"Range": f"bytes={start}-"} if start else {}
            with _errors(ref):
                answer = client.get_object(
                    Bucket=bucket, Key=f"{prefix}/{file.name}", IfMatch=file.locator, **part
                )
            with contextlib.closing(answer["Body"]) as body:
                yield Opened(start=start, total=file.size, chunks=_chunks(ref, body))

        return opener

    def _connected(self, ref: AdapterRef, context: FetchContext) -> Any:
        if self._client is None:
            try:
                import boto3
                from botocore.config import Config
            except ImportError as error:
                raise refused(
                    f"adapter {ref}: this server cannot read S3; install lorax-py[s3]"
                ) from error
            config = Config(
                connect_timeout=context.limits.connect_timeout_s,
                read_timeout=context.limits.stall_timeout_s,
                # Trying again is ours: it resumes, and it knows the deadline.
                retries={"total_max_attempts": 1},
            )
            self._client = boto3.client("s3", endpoint_url=self._endpoint, config=config)
        return self._client


def _chunks(ref: AdapterRef, body: Any) -> Iterator[bytes]:
    with _errors(ref):
        yield from body.iter_chunks(_CHUNK_BYTES)


@contextlib.contextmanager
def _errors(ref: AdapterRef) -> Iterator[None]:
    """Say in words what boto3's errors mean."""
    from botocore import exceptions

    try:
        yield
    except exceptions.ClientError as error:
        raise _client_error(ref, error) from error
    except exceptions.NoCredentialsError as error:
        raise AdapterUnavailableError(
            Reason.NO_ACCESS, f"adapter {ref}: this server has no credentials for S3"
        ) from error
    except exceptions.BotoCoreError as error:
        raise Broken(f"S3 could not be reached or broke off ({type(error).__name__})") from error


def _client_error(ref: AdapterRef, error: Any) -> Exception:
    code = str(error.response.get("Error", {}).get("Code", ""))
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    if code == "PreconditionFailed" or status == 412:
        return transient(f"adapter {ref}: it was replaced while it was fetched; try again")
    if code in ("NoSuchBucket", "NoSuchKey") or status == 404:
        return not_found(ref, "is not in S3: check bucket and prefix")
    if status in (401, 403):
        return AdapterUnavailableError(
            Reason.NO_ACCESS, f"adapter {ref}: this server has no access to it in S3"
        )
    if status >= 500 or status == 429 or code in ("SlowDown", "RequestTimeout"):
        return Broken(f"S3 answered with status {status} {code}")
    return transient(f"adapter {ref}: S3 answered with status {status} {code}")


def _split(place: str) -> tuple[str, str]:
    """Return bucket and prefix of s3://bucket/prefix; the scheme may be left out."""
    bucket, _, prefix = place.removeprefix(_SCHEME).partition("/")
    return bucket, prefix.strip("/")
