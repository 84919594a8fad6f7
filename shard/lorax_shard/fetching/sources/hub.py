"""Adapters from the Hugging Face hub.

A repository is asked for without a token first. So a public adapter is never tied to a
caller, and a key that was meant for another service is not sent to the hub for it. Then
come the caller's token and, if the operator set one, the server's.

Listings, access and the meaning of errors are the hub library's. The bytes of files are
taken in here: the library's download (hf_hub_download) throws away what came of a file
when it is ended, hands it on in pieces of 10 MiB and tries again by a clock of its own, so
that neither taking a file up again nor the limits, the longest silence and the deadline
while its bytes arrive could be kept.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelInfo, constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

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
        self._endpoint = (settings.hub_endpoint or constants.ENDPOINT).rstrip("/")
        self._offline = settings.offline or bool(constants.HF_HUB_OFFLINE)
        self._server_token = settings.server_token

    @property
    def realm(self) -> str:
        """Which of these places it is."""
        return without_secrets(self._endpoint, ())

    def resolve(self, ref: AdapterRef, token: str | None, context: FetchContext) -> Resolved:
        """Return the commit that ``ref`` names now, and which token opened it."""
        self._check(ref)
        keys: list[tuple[Access, str | None]] = [("public", None)]
        keys += [("token", token)] if token else []
        keys += [("server", self._server_token)] if self._server_token else []
        gated = False
        for access, key in keys:
            try:
                listing = retried(
                    f"adapter {ref}", partial(self._listing, ref, key, context), context
                )
                resolved = _resolved(ref, listing, access, key)
                if listing.gated:
                    # Everybody sees a gated repository's listing; its files open for some.
                    retried(f"adapter {ref}", partial(self._probe, ref, resolved, context), context)
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
            download(
                f"adapter {ref}", file, folder, self._opener(ref, resolved, file, context), context
            )
            for file in resolved.files
        )

    def _check(self, ref: AdapterRef) -> None:
        if not _ID.fullmatch(ref.id) or ".." in ref.id:
            # Whatever it is called, there is none.
            raise not_found(ref, "is not a hub id: it is named like org/name")
        if ref.revision is not None and (
            not _REVISION.fullmatch(ref.revision) or ".." in ref.revision
        ):
            raise not_found(ref, "has no such revision: give a branch, a tag or a commit")
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

    def _listing(self, ref: AdapterRef, key: str | None, context: FetchContext) -> ModelInfo:
        with self._errors(ref, key):
            try:
                return HfApi(self._endpoint).model_info(
                    ref.id,
                    revision=ref.revision or "main",
                    files_metadata=True,
                    timeout=_seconds(context),
                    token=key or False,
                )
            except (KeyError, TypeError, ValueError) as error:
                raise Broken("the hub's answer is no listing of a repository") from error

    def _probe(self, ref: AdapterRef, resolved: Resolved, context: FetchContext) -> None:
        """Raise _Shut unless the configuration's download opens with the version's token."""
        url = self._url(ref, resolved, CONFIG_FILE)
        with self._errors(ref, resolved.token):
            get_hf_file_metadata(url, token=resolved.token or False, timeout=_seconds(context))

    def _url(self, ref: AdapterRef, resolved: Resolved, name: str) -> str:
        url: str = hf_hub_url(ref.id, name, revision=resolved.version, endpoint=self._endpoint)
        return url

    def _opener(
        self, ref: AdapterRef, resolved: Resolved, file: RemoteFile, context: FetchContext
    ) -> Opener:
        @contextlib.contextmanager
        def opener(start: int) -> Iterator[Opened]:
            headers = build_hf_headers(token=resolved.token or False)
            headers["Accept-Encoding"] = "identity"
            if start:
                headers["Range"] = f"bytes={start}-"
            url = self._url(ref, resolved, file.name)
            try:
                with (
                    self._errors(ref, resolved.token),
                    # Redirects to another host carry no token (the client's rule).
                    get_session().stream(
                        "GET", url, headers=headers, timeout=_timeout(context)
                    ) as response,
                ):
                    if start and response.status_code == 416:
                        # Nothing is left to send, or the kept bytes are of another file.
                        end = _known_end(file, start)
                        yield Opened(start=end, total=file.size, chunks=iter(()))
                        return
                    hf_raise_for_status(response)
                    first, total = _extent(response, start)
                    yield Opened(start=first, total=total, chunks=response.iter_raw(_CHUNK_BYTES))
            except _Shut as shut:
                raise self._not_let_in(ref, resolved.token, shut.gated) from shut

        return opener

    @contextlib.contextmanager
    def _errors(self, ref: AdapterRef, token: str | None) -> Iterator[None]:
        """Say in words what the hub library's errors mean."""
        library = _http_library()
        try:
            yield
        except RevisionNotFoundError as error:
            text = "has no such revision: give a branch, a tag or a commit"
            raise not_found(ref, text) from error
        except RepositoryNotFoundError as error:
            raise _Shut(gated=isinstance(error, GatedRepoError)) from error
        except HfHubHTTPError as error:
            raise _meaning(ref, error.response) from error
        except (library.TransportError, library.TooManyRedirects) as error:
            raise Broken(
                f"the hub at {self._endpoint} could not be reached or broke off: "
                + without_secrets(f"{type(error).__name__}: {error}"[:200], [token])
            ) from error
        except (library.InvalidURL, UnicodeError) as error:
            raise refused(f"adapter {ref}: the token or the id cannot be sent") from error


def _http_library() -> Any:
    """Return the HTTP library that the hub library uses: httpx or its successor."""
    return sys.modules[type(get_session()).__module__.partition(".")[0]]


def _seconds(context: FetchContext) -> float:
    """Return for how long a silent hub is waited for."""
    return max(0.1, min(context.limits.stall_timeout_s, context.deadline - context.now()))


def _timeout(context: FetchContext) -> Any:
    seconds = _seconds(context)
    connect = min(context.limits.connect_timeout_s, seconds)
    return _http_library().Timeout(seconds, connect=connect)


def _meaning(ref: AdapterRef, response: Any) -> Exception:
    """Return the error for an answer that says only a status."""
    status = response.status_code
    if status in (401, 403) or (status == 404 and not response.headers.get("x-error-code")):
        return _Shut(gated=False)
    if status in _PASSING:
        return Broken(f"the hub answered with status {status}", _retry_after(response))
    return transient(f"adapter {ref}: the hub answered with status {status}")


def _resolved(ref: AdapterRef, listing: ModelInfo, access: Access, key: str | None) -> Resolved:
    if not isinstance(listing.sha, str) or not _COMMIT.fullmatch(listing.sha):
        raise transient(f"adapter {ref}: the hub did not name a commit")
    entries = {each.rfilename: each for each in listing.siblings or ()}
    files = tuple(_announced(entries[name]) for name in select_files(ref, entries))
    return Resolved(version=listing.sha, files=files, access=access, token=key)


def _announced(sibling: Any) -> RemoteFile:
    sha256 = None if sibling.lfs is None else sibling.lfs.sha256
    return RemoteFile(
        name=sibling.rfilename,
        size=sibling.size if isinstance(sibling.size, int) and sibling.size >= 0 else None,
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


def _retry_after(response: Any) -> float | None:
    value = response.headers.get("retry-after", "")
    return float(value) if value.isdigit() else None
