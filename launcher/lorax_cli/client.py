"""What is asked of a server over HTTP, and its errors in its own words."""

from __future__ import annotations

import json
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

Body = Mapping[str, Any]
# A first token may wait for an adapter that is fetched; connections do not.
_TIMEOUT = httpx.Timeout(600.0, connect=10.0)


class CliError(Exception):
    """Something that the person at the terminal is told in one sentence."""


def admin_sockets() -> list[Path]:
    """Return the sockets on which servers of this user and machine are managed."""
    found = Path(tempfile.gettempdir()).glob("lorax-*/admin")
    return sorted(path for path in found if _listens(path))


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(2.0)
        try:
            probe.connect(str(path))
        except OSError:  # another user's, of a server that was killed, or gone just now
            return False
    return True


class Server:
    """A server that serves clients; where adapters are managed is looked for when it is needed.

    Args:
        url: where clients ask.
        key: an API key, or None.
        admin: where adapters are managed: a path of a unix socket, or a URL; None: with a key where
            clients ask, without one at the one socket that a server of this user has.
    """

    def __init__(self, url: str, key: str | None, admin: str | None = None) -> None:
        self.url = url.rstrip("/")
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.Client(
            base_url=self.url, headers=headers, timeout=_TIMEOUT, trust_env=False
        )
        self._key, self._admin = key, admin

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def models(self) -> list[dict[str, Any]]:
        """Return what may be named as a model: the base first."""
        return list(self._answer(self._http, "GET", "/v1/models")["data"])

    def stream(self, path: str, body: Body) -> Iterator[dict[str, Any]]:
        """Yield the events of a streamed answer; one that is an error raises CliError."""
        with (
            self._reached(self._http) as http,
            http.stream("POST", path, json=dict(body)) as answer,
        ):
            if answer.status_code != 200:
                answer.read()
                raise CliError(_words_of(answer))
            for line in answer.iter_lines():
                if line.startswith("data:") and (text := line[5:].strip()) != "[DONE]":
                    event = json.loads(text)
                    if "error" in event:
                        raise CliError(_message(event) or text)
                    yield event

    def adapters(self, **filters: str) -> Iterator[dict[str, Any]]:
        """Yield the adapters that the server knows, page by page."""
        cursor: str | None = None
        while True:
            page = {**filters, **({"cursor": cursor} if cursor else {})}
            answer = self._answer(self._http, "GET", "/v1/adapters", params=page)
            yield from answer["adapters"]
            if (cursor := answer["next_cursor"]) is None:
                return

    def manage(self, verb: str, body: Body) -> dict[str, Any]:
        """Load, pin, unpin, reload or unload an adapter."""
        with self._manager() as http:
            done: dict[str, Any] = self._answer(
                http, "POST", f"/v1/adapters/{verb}", json=dict(body)
            )
        return done

    @contextmanager
    def _manager(self) -> Iterator[httpx.Client]:
        address = self._admin or (None if self._key else self._found_socket())
        if address is None:
            yield self._http
            return
        is_url = address.startswith(("http://", "https://"))
        transport = None if is_url else httpx.HTTPTransport(uds=address.removeprefix("unix:"))
        base = address if is_url else "http://localhost"
        with httpx.Client(
            base_url=base, transport=transport, timeout=_TIMEOUT, trust_env=False
        ) as http:
            yield http

    @staticmethod
    def _found_socket() -> str:
        found = admin_sockets()
        if len(found) == 1:
            return str(found[0])
        where = "none is" if not found else f"{', '.join(map(str, found))} are"
        raise CliError(
            f"adapters are managed on a socket of their own, and {where} there: name it with --admin "
            "(the server's ready line has it), or give an admin's key with --api-key"
        )

    def _answer(self, http: httpx.Client, method: str, path: str, **asked: Any) -> Any:
        with self._reached(http):
            answer = http.request(method, path, **asked)
        if answer.status_code != 200:
            raise CliError(_words_of(answer))
        return answer.json()

    @contextmanager
    def _reached(self, http: httpx.Client) -> Iterator[httpx.Client]:
        try:
            yield http
        except (httpx.ConnectError, httpx.UnsupportedProtocol) as error:
            raise CliError(
                f"no server answers at {http.base_url}: {error}; is it running? --url says where"
            ) from error
        except httpx.HTTPError as error:
            raise CliError(f"the answer broke off: {str(error) or type(error).__name__}") from error


def _words_of(answer: httpx.Response) -> str:
    """Return what a server says is wrong, whichever dialect it says it in."""
    try:
        words = _message(answer.json())
    except ValueError:
        words = ""
    if answer.status_code == 401 and words:
        words += " (--api-key, or LORAX_API_KEY)"
    return words or f"the server answered {answer.status_code} {answer.reason_phrase}"


def _message(document: Any) -> str:
    error = document.get("error") if isinstance(document, dict) else None
    found = error.get("message") if isinstance(error, dict) else error
    return str(found) if found else ""
