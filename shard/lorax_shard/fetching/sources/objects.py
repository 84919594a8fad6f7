"""Objects in buckets of S3 and of what speaks like it: listed, read, errors said in words.

Needs the extra ``s3`` (boto3). Credentials come from boto3's usual places.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from lorax_contract.adapters import AdapterUnavailableError, Reason, refused
from lorax_shard.fetching.sources.interface import FetchLimits, RemoteFile, transient
from lorax_shard.fetching.sources.stream import Broken, Opened, Opener

SCHEME = "s3://"
_CHUNK_BYTES = 1 << 20
# Far more objects than a folder of an adapter or a model has.
_MAX_OBJECTS = 1000


def split_place(place: str) -> tuple[str, str]:
    """Return bucket and prefix of s3://bucket/prefix; the scheme may be left out."""
    bucket, _, prefix = place.removeprefix(SCHEME).partition("/")
    return bucket, prefix.strip("/")


class S3Objects:
    """One connection to one S3; ``what`` is what is fetched, as error texts name it."""

    def __init__(self, endpoint: str | None) -> None:
        self._endpoint = endpoint
        self._client: Any = None

    def below(
        self, what: str, bucket: str, prefix: str, limits: FetchLimits
    ) -> dict[str, RemoteFile]:
        """Return the objects directly below ``prefix`` by name, each found by its entity tag."""
        answer = self._listed(what, bucket, prefix, limits)
        files = (
            RemoteFile(
                name=item["Key"].removeprefix(f"{prefix}/"),
                size=int(item["Size"]),
                locator=str(item["ETag"]),
            )
            for item in answer.get("Contents", [])
        )
        return {file.name: file for file in files}

    def folders(self, what: str, bucket: str, prefix: str, limits: FetchLimits) -> list[str]:
        """Return the names of what stands for folders directly below ``prefix``."""
        found = self._listed(what, bucket, prefix, limits).get("CommonPrefixes", [])
        return [item["Prefix"].removeprefix(f"{prefix}/").rstrip("/") for item in found]

    def _listed(self, what: str, bucket: str, prefix: str, limits: FetchLimits) -> Any:
        client = self._connected(what, limits)
        with _errors(what):
            return client.list_objects_v2(
                Bucket=bucket, Prefix=f"{prefix}/", Delimiter="/", MaxKeys=_MAX_OBJECTS
            )

    def opener(
        self, what: str, bucket: str, key: str, file: RemoteFile, limits: FetchLimits
    ) -> Opener:
        """Return what opens an object from a position on; one that was replaced ends the fetch."""
        client = self._connected(what, limits)

        @contextlib.contextmanager
        def opener(start: int) -> Iterator[Opened]:
            if start and start == file.size:
                yield Opened(start=start, total=start, chunks=iter(()))
                return
            part = {"Range": f"bytes={start}-"} if start else {}
            with _errors(what):
                answer = client.get_object(Bucket=bucket, Key=key, IfMatch=file.locator, **part)
            with contextlib.closing(answer["Body"]) as body:
                yield Opened(start=start, total=file.size, chunks=_chunks(what, body))

        return opener

    def _connected(self, what: str, limits: FetchLimits) -> Any:
        if self._client is None:
            try:
                import boto3
                from botocore.config import Config
            except ImportError as error:
                raise refused(
                    f"{what}: this server cannot read S3; install lorax-py[s3]"
                ) from error
            config = Config(
                connect_timeout=limits.connect_timeout_s,
                read_timeout=limits.stall_timeout_s,
                # Trying again is ours: it resumes, and it knows the deadline.
                retries={"total_max_attempts": 1},
            )
            self._client = boto3.client("s3", endpoint_url=self._endpoint, config=config)
        return self._client


def _chunks(what: str, body: Any) -> Iterator[bytes]:
    with _errors(what):
        yield from body.iter_chunks(_CHUNK_BYTES)


@contextlib.contextmanager
def _errors(what: str) -> Iterator[None]:
    """Say in words what boto3's errors mean."""
    from botocore import exceptions

    try:
        yield
    except exceptions.ClientError as error:
        raise _client_error(what, error) from error
    except exceptions.NoCredentialsError as error:
        raise AdapterUnavailableError(
            Reason.NO_ACCESS, f"{what}: this server has no credentials for S3"
        ) from error
    except exceptions.BotoCoreError as error:
        raise Broken(f"S3 could not be reached or broke off ({type(error).__name__})") from error


def _client_error(what: str, error: Any) -> Exception:
    code = str(error.response.get("Error", {}).get("Code", ""))
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    if code == "PreconditionFailed" or status == 412:
        return transient(f"{what}: it was replaced while it was fetched; try again")
    if code in ("NoSuchBucket", "NoSuchKey") or status == 404:
        return AdapterUnavailableError(
            Reason.NOT_FOUND, f"{what} is not in S3: check bucket and prefix"
        )
    if status in (401, 403):
        return AdapterUnavailableError(
            Reason.NO_ACCESS, f"{what}: this server has no access to it in S3"
        )
    if status >= 500 or status == 429 or code in ("SlowDown", "RequestTimeout"):
        return Broken(f"S3 answered with status {status} {code}")
    return transient(f"{what}: S3 answered with status {status} {code}")
