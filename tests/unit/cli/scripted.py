"""A server of a few routes whose answers a test writes down."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Asked:
    """What was asked: bodies, keys, and paths with their queries."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []


@contextmanager
def serving(answers: dict[str, list[Any]]) -> Iterator[tuple[str, Asked]]:
    """Answer each path by its list, one after the other; gives the URL, and what was asked.

    A list of events is streamed; a pair is a status and a document.
    """
    asked = Asked()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._take()

        def do_POST(self) -> None:
            self._take()

        def _take(self) -> None:
            asked.paths.append(self.path)
            asked.keys.append(self.headers.get("authorization"))
            if length := int(self.headers.get("content-length") or 0):
                asked.bodies.append(json.loads(self.rfile.read(length)))
            answer = answers[self.path.partition("?")[0]].pop(0)
            status, document = answer if isinstance(answer, tuple) else (200, answer)
            if isinstance(document, list):
                lines = [f"data: {json.dumps(event)}\n\n" for event in document]
                data = "".join([": still here\n\n", *lines, "data: [DONE]\n\n"]).encode()
            else:
                data = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


MODELS = {"data": [{"id": "the-base"}, {"id": "pirate"}]}


def chunks(text: str, usage: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """Return the events of a chat that says a text word by word."""
    words = [{"choices": [{"delta": {"content": word}}]} for word in text.split(" ")]
    return [*words, *([{"choices": [], "usage": usage}] if usage else [])]
