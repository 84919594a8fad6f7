"""A small stand-in for the Hugging Face hub: repositories from memory over local HTTP."""

from __future__ import annotations

import hashlib
import json
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class StubHub:
    """What the stub serves and what it was asked for."""

    # Files by repository id.
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    # Repositories that only this token opens, and those that are gated.
    private: dict[str, str] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    # Files whose first download breaks off half way.
    breaks_once: set[str] = field(default_factory=set)
    # Commits of repositories that do not have the usual one.
    commits: dict[str, str] = field(default_factory=dict)
    # Repositories whose listing everybody sees and whose files only this token opens.
    gated_files: dict[str, str] = field(default_factory=dict)
    # Files that are announced with a digest which their bytes do not have.
    damaged: set[str] = field(default_factory=set)
    # Files that are sent without a length, and files whose sending never ends.
    unannounced: set[str] = field(default_factory=set)
    endless: set[str] = field(default_factory=set)
    # Sends nothing of these files before the event is set.
    held: dict[str, threading.Event] = field(default_factory=dict)
    # How many seconds sending a file of these repositories takes; infinite: half of it comes.
    seconds: dict[str, float] = field(default_factory=dict)
    # Set when the hub ends, so that nobody goes on waiting.
    closing: threading.Event = field(default_factory=threading.Event)
    # Files are answered with a redirect to this address, where they are sent to everybody.
    elsewhere: str | None = None
    # Statuses of the next answers, the first one first.
    next_statuses: list[int] = field(default_factory=list)
    # Status that every API call gets, if not None.
    failing_with: int | None = None
    # "METHOD path" of every request, and the Range headers of downloads.
    requests: list[str] = field(default_factory=list)
    ranges: list[str] = field(default_factory=list)
    # The tokens that came with them; "" for none.
    tokens: list[str] = field(default_factory=list)
    url: str = ""

    def downloads(self) -> list[str]:
        """Return the names of files that were fetched."""
        return [
            line.rsplit("/", 1)[1]
            for line in self.requests
            if line.startswith("GET") and "/resolve/" in line
        ]


@contextmanager
def running_hub(hub: StubHub) -> Iterator[StubHub]:
    """Serve ``hub`` on a free port; its ``url`` is set."""
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        hub.closing.set()
        server.shutdown()
        thread.join()
        server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing about clients that went away; tests do that on purpose."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    # Set on the subclass that one running hub uses.
    hub: StubHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def log_message(self, *args: object) -> None:
        """Keep the test's output clean."""

    def _answer(self) -> None:
        path = urlsplit(self.path).path
        self.hub.requests.append(f"{self.command} {path}")
        self.hub.tokens.append(self._token())
        api = re.fullmatch(r"/api/models/(.+?)/(revision|tree)/([^/]+)", path)
        file = re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", path)
        match = api or file
        if self.hub.failing_with is not None:
            return self._error(self.hub.failing_with, "", "the hub has a bad day")
        if self.hub.next_statuses:
            return self._error(self.hub.next_statuses.pop(0), "", "the hub has a bad minute")
        if match is None or (refusal := self._refusal(match[1])):
            return self._error(*(refusal if match else (404, "", "no such page")))
        files = self.hub.repositories[match[1]]
        revision = match[3] if api else match[2]
        if revision not in ("main", self.hub.commits.get(match[1], COMMIT)):
            return self._error(404, "RevisionNotFound", "no such revision")
        if api:
            return self._api(api[2], match[1], files)
        if self.hub.gated_files.get(match[1], self._token()) != self._token():
            return self._error(403, "GatedRepo", "accept the terms")
        if self.hub.elsewhere is not None:
            return self._send(302, b"", {"Location": f"{self.hub.elsewhere}{self.path}"})
        if (seconds := self.hub.seconds.get(match[1])) and self.command == "GET":
            return self._trickle(files[match[3]], seconds)
        return self._file(files[match[3]], match[3])

    def _token(self) -> str:
        return (self.headers.get("authorization") or "").removeprefix("Bearer ")

    def _refusal(self, name: str) -> tuple[int, str, str] | None:
        token = self._token()
        if name in self.hub.gated:
            return 403, "GatedRepo", "accept the terms"
        if self.hub.private.get(name, token) != token:
            return 401, "RepoNotFound", "Repository not found"
        return (
            None if name in self.hub.repositories else (404, "RepoNotFound", "Repository not found")
        )

    def _api(self, kind: str, name: str, files: dict[str, bytes]) -> None:
        listing = [
            {
                "type": "file",
                "path": path,
                "size": len(data),
                "oid": hashlib.sha1(data).hexdigest(),
            }
            for path, data in files.items()
        ]
        siblings = [self._sibling(path, data) for path, data in files.items()]
        commit = self.hub.commits.get(name, COMMIT)
        info = {"id": name, "modelId": name, "sha": commit, "siblings": siblings}
        info["gated"] = "auto" if name in self.hub.gated_files else False
        self._send(200, json.dumps(info if kind == "revision" else listing).encode())

    def _sibling(self, path: str, data: bytes) -> dict[str, object]:
        if "blobs=true" not in self.path or path in self.hub.unannounced | self.hub.endless:
            return {"rfilename": path}
        found: dict[str, object] = {"rfilename": path, "size": len(data)}
        if path.endswith(".safetensors"):
            digest = hashlib.sha256(b"other" if path in self.hub.damaged else data).hexdigest()
            found["lfs"] = {"sha256": digest, "size": len(data), "pointerSize": 134}
        return found

    def _file(self, data: bytes, name: str) -> None:
        headers = {
            "ETag": f'"{hashlib.sha1(data).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
        }
        if event := self.hub.held.get(name):
            event.wait(60)
        if name in self.hub.endless:
            return self._send_for_ever()
        if (wanted := self.headers.get("range")) and self.command == "GET":
            self.hub.ranges.append(wanted)
            start = int(wanted.removeprefix("bytes=").partition("-")[0])
            if start >= len(data):
                return self._error(416, "", "nothing is left to send")
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            return self._send(206, data[start:], headers)
        if self.command == "GET" and name in self.hub.breaks_once:
            self.hub.breaks_once.discard(name)
            return self._send(200, data, headers, stop_after=len(data) // 2)
        return self._send(200, data, headers)

    def _trickle(self, data: bytes, seconds: float) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.close_connection = True
        is_endless = seconds == float("inf")
        pieces = range(0, len(data) // 2 if is_endless else len(data), max(1, len(data) // 50))
        try:
            for start in pieces:
                self.wfile.write(data[start : start + pieces.step])
                self.hub.closing.wait(0 if is_endless else seconds / len(pieces))
        except OSError:
            return
        if is_endless:
            self.hub.closing.wait()

    def _send_for_ever(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.close_connection = True
        try:
            while True:
                self.wfile.write(bytes(1 << 16))
        except OSError:
            return

    def _error(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        self._send(status, json.dumps({"error": message}).encode(), headers)

    def _send(
        self,
        status: int,
        body: bytes,
        headers: dict[str, str] | None = None,
        stop_after: int | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:stop_after])
        if stop_after is not None:
            self.close_connection = True
