"""Adapters from the Hugging Face hub, over its plain HTTP interface.

A repository is asked for without a token first. So a public adapter is never tied to a
caller, and a key that was meant for another service is not sent to the hub for it. Then
come the caller's token and, if the operator set one, the server's.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from lorax_contract.adapters import Access, AdapterRef, AdapterUnavailableError, Reason, refused
from lorax_shard.adapter_files import CONFIG_FILE, StoredFile
from lorax_shard.fetching.redact import without_secrets
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

_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_REVISION = re.compile(r"[\w][\w./+-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_COMMIT = re.compile(r"[0-9a-f]{7,64}")
# A listing names every file of a repository; an adapter's is a few kilobytes.
_MAX_LISTING_BYTES = 16 << 20
_CHUNK_BYTES = 1 << 20
_PASSING = (408, 425, 429, 500, 502, 503, 504)


class _Shut(Exception):
    """The hub does not show a repository to this token."""

    def __init__(self, gated: bool) -> None:
        super().__init__("gated" if gated else "hidden")
        self.gated = gated


class HubSource:
    """Repositories of one hub."""

    def __init__(self, settings: SourceSettings) -> None:
        # Imported late: the other sources do not need it.
        from huggingface_hub import constants

        self._endpoint = (settings.hub_endpoint or constants.ENDPOINT).rstrip("/")
        self._offline = settings.offline or bool(constants.HF_HUB_OFFLINE)
        self._server_token = settings.server_token

    @property
    def realm(self) -> str:
        """Which of these places it is."""
        return self._endpoint

    def resolve(self, ref: AdapterRef, token: str | None, context: FetchContext) -> Resolved:
        """Return the commit that ``ref`` names now, and which token opened it."""
        self._check(ref)
        keys: list[tuple[Access, str | None]] = [("public", None)]
        keys += [("token", token)] if token else []
        keys += [("server", self._server_token)] if self._server_token else []
        gated = False
        for access, key in keys:
            try:
                listing = retried(ref, partial(self._listing, ref, key, context), context)
                resolved = self._resolved(ref, listing, access, key)
                if listing.get("gated"):
                    # Everybody sees a gated repository's listing; its files open for some.
                    retried(ref, partial(self._probe, ref, resolved, context), context)
            except _Shut as shut:
                gated = gated or shut.gated
                continue
            return resolved
        raise self._not_let_in(ref, token, gated)

    def fetch(
        self, ref: AdapterRef, resolved: Resolved, folder: Path, context: FetchContext
    ) -> tuple[StoredFile, ...]:
        """Download the commit's files; what an earlier try left in ``folder`` is used."""
        return tuple(
            download(ref, file, folder, self._opener(ref, resolved, file, context), context)
            for file in resolved.files
        )

    def _check(self, ref: AdapterRef) -> None:
        if not _ID.fullmatch(ref.id) or ".." in ref.id:
            raise refused(f"adapter {ref} is not a hub id: it is named like org/name")
        if ref.revision is not None and (
            not _REVISION.fullmatch(ref.revision) or ".." in ref.revision
        ):
            raise refused(f"adapter {ref}: the revision is no branch, tag or commit")
        if self._offline:
            raise AdapterUnavailableError(
                Reason.OFFLINE,
                f"adapter {ref} is not in the store and the hub is switched off "
                "(HF_HUB_OFFLINE); fetch it once while online, or use a local folder",
            )

    def _not_let_in(self, ref: AdapterRef, token: str | None, gated: bool) -> Exception:
        if gated:
            text = (
                f"adapter {ref} is gated: accept its terms on the hub and send a token of that "
                "account as api_token"
            )
            return AdapterUnavailableError(Reason.NO_ACCESS, text)
        if token:
            text = f"adapter {ref} is not on the hub, or the given api_token does not open it"
            return AdapterUnavailableError(Reason.NO_ACCESS, text)
        return not_found(
            ref, "is not on the hub, or it is private: check the spelling, or send an api_token"
        )

    def _listing(self, ref: AdapterRef, key: str | None, context: FetchContext) -> dict[str, Any]:
        revision = quote(ref.revision or "main", safe="")
        url = f"{self._endpoint}/api/models/{ref.id}/revision/{revision}?blobs=true"
        with self._stream(ref, url, key, {}, context) as response:
            if _code(response) == "RevisionNotFound":
                raise not_found(ref, "has no such revision: give a branch, a tag or a commit")
            self._raise_for_status(ref, response)
            body = b""
            for chunk in response.iter_raw(_CHUNK_BYTES):
                body += chunk
                context.check_deadline(ref)
                if len(body) > _MAX_LISTING_BYTES:
                    raise refused(f"adapter {ref}: its repository has too many files to list")
        try:
            listing = json.loads(body)
        except ValueError as error:
            raise Broken("the hub's answer is not JSON") from error
        if not isinstance(listing, dict):
            raise Broken("the hub's answer is not a listing")
        return listing

    def _probe(self, ref: AdapterRef, resolved: Resolved, context: FetchContext) -> None:
        """Raise _Shut unless the configuration's download opens with the version's token.

        A GET whose body is left unread: storage that the hub redirects to may refuse a HEAD.
        """
        url = f"{self._endpoint}/{ref.id}/resolve/{resolved.version}/{CONFIG_FILE}"
        with self._stream(ref, url, resolved.token, {}, context) as response:
            self._raise_for_status(ref, response)

    def _resolved(
        self, ref: AdapterRef, listing: Mapping[str, Any], access: Access, key: str | None
    ) -> Resolved:
        commit, siblings = listing.get("sha"), listing.get("siblings")
        if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
            raise transient(f"adapter {ref}: the hub did not name a commit")
        entries = {
            item["rfilename"]: item
            for item in (siblings if isinstance(siblings, list) else [])
            if isinstance(item, dict) and isinstance(item.get("rfilename"), str)
        }
        files = tuple(_announced(entries[name]) for name in select_files(ref, entries))
        return Resolved(version=commit, files=files, access=access, token=key)

    def _opener(
        self, ref: AdapterRef, resolved: Resolved, file: RemoteFile, context: FetchContext
    ) -> Opener:
        url = f"{self._endpoint}/{ref.id}/resolve/{resolved.version}/{quote(file.name)}"

        @contextlib.contextmanager
        def opener(start: int) -> Iterator[Opened]:
            headers = {"Range": f"bytes={start}-"} if start else {}
            with self._stream(ref, url, resolved.token, headers, context) as response:
                if start and response.status_code == 416:
                    # Nothing is left to send, or the kept bytes are of another file.
                    yield Opened(start=_known_end(file, start), total=file.size, chunks=iter(()))
                    return
                try:
                    self._raise_for_status(ref, response)
                except _Shut as shut:
                    raise self._not_let_in(ref, resolved.token, shut.gated) from shut
                first, total = _extent(response, start)
                chunks = response.iter_raw(_CHUNK_BYTES)
                yield Opened(start=first, total=total, chunks=chunks)

        return opener

    @contextlib.contextmanager
    def _stream(
        self,
        ref: AdapterRef,
        url: str,
        token: str | None,
        headers: Mapping[str, str],
        context: FetchContext,
    ) -> Iterator[Any]:
        """Open one request. Redirects to another host carry no token (the client's rule)."""
        from huggingface_hub import get_session

        session = get_session()
        sent = {**headers, "Accept-Encoding": "identity"}
        if token:
            sent["Authorization"] = f"Bearer {token}"
        limits = context.limits
        seconds = max(0.1, min(limits.stall_timeout_s, context.deadline - context.now()))
        # httpx and its successor are known by the client's module only.
        library = sys.modules[type(session).__module__.partition(".")[0]]
        timeout = library.Timeout(seconds, connect=min(limits.connect_timeout_s, seconds))
        try:
            with session.stream("GET", url, headers=sent, timeout=timeout) as response:
                if response.headers.get("content-encoding", "identity") != "identity":
                    raise Broken("the hub's answer is compressed, which was not asked for")
                yield response
        except (library.TransportError, library.TooManyRedirects) as error:
            raise Broken(
                f"the hub at {self._endpoint} could not be reached or broke off: "
                + without_secrets(f"{type(error).__name__}: {error}"[:200], [token])
            ) from error
        except (library.InvalidURL, UnicodeError) as error:
            raise refused(f"adapter {ref}: the token or the id cannot be sent") from error

    def _raise_for_status(self, ref: AdapterRef, response: Any) -> None:
        status = response.status_code
        if status in (401, 403) or (status == 404 and _code(response) in ("", "RepoNotFound")):
            raise _Shut(gated=_code(response) == "GatedRepo")
        if status in _PASSING:
            raise Broken(f"the hub answered with status {status}", _retry_after(response))
        if status not in (200, 206):
            raise transient(f"adapter {ref}: the hub answered with status {status}")


def _announced(item: Mapping[str, Any]) -> RemoteFile:
    lfs = item.get("lfs") if isinstance(item.get("lfs"), dict) else {}
    size = item.get("size", lfs.get("size") if lfs else None)
    sha256 = (lfs or {}).get("sha256")
    return RemoteFile(
        name=str(item["rfilename"]),
        size=size if isinstance(size, int) and size >= 0 else None,
        sha256=sha256 if isinstance(sha256, str) and _SHA256.fullmatch(sha256) else None,
    )


def _known_end(file: RemoteFile, start: int) -> int:
    """Return how many kept bytes are good when the hub has none to add."""
    return start if file.size in (None, start) else 0


def _extent(response: Any, start: int) -> tuple[int, int | None]:
    """Return where the answer's bytes start in the file, and the file's length if it says so."""
    if response.status_code == 206:
        match = re.fullmatch(r"bytes (\d+)-\d*/(\d+|\*)", response.headers.get("content-range", ""))
        if match is None or int(match[1]) != start:
            raise Broken("the hub sent another part of the file than was asked for")
        return start, None if match[2] == "*" else int(match[2])
    length = response.headers.get("content-length", "")
    return 0, int(length) if length.isdigit() else None


def _code(response: Any) -> str:
    return str(response.headers.get("x-error-code", ""))


def _retry_after(response: Any) -> float | None:
    value = response.headers.get("retry-after", "")
    return float(value) if value.isdigit() else None
