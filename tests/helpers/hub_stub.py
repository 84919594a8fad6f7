"""A small stand-in for the Hugging Face hub: repositories from memory over local HTTP."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
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
    # Status that every API call gets, if not None.
    failing_with: int | None = None
    # "METHOD path" of every request, and the Range headers of downloads.
    requests: list[str] = field(default_factory=list)
    ranges: list[str] = field(default_factory=list)
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
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


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
        api = re.fullmatch(r"/api/models/(.+?)/(revision|tree)/([^/]+)", path)
        file = re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", path)
        match = api or file
        if self.hub.failing_with is not None:
            return self._error(self.hub.failing_with, "", "the hub has a bad day")
        if match is None or (refusal := self._refusal(match[1])):
            return self._error(*(refusal if match else (404, "", "no such page")))
        files = self.hub.repositories[match[1]]
        revision = match[3] if api else match[2]
        if revision not in ("main", COMMIT):
            return self._error(404, "RevisionNotFound", "no such revision")
        if api:
            return self._api(api[2], match[1], files)
        return self._file(files[match[3]], match[3])

    def _refusal(self, name: str) -> tuple[int, str, str] | None:
        token = (self.headers.get("authorization") or "").removeprefix("Bearer ")
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
        siblings = [{"rfilename": path} for path in files]
        info = {"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings}
        self._send(200, json.dumps(info if kind == "revision" else listing).encode())

    def _file(self, data: bytes, name: str) -> None:
        headers = {
            "ETag": f'"{hashlib.sha1(data).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
        }
        if (wanted := self.headers.get("range")) and self.command == "GET":
            self.hub.ranges.append(wanted)
            start = int(wanted.removeprefix("bytes=").partition("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            return self._send(206, data[start:], headers)
        if self.command == "GET" and name in self.hub.breaks_once:
            self.hub.breaks_once.discard(name)
            return self._send(200, data, headers, stop_after=len(data) // 2)
        return self._send(200, data, headers)

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
