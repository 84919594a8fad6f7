"""Requests beside the browser, so that there is something to look at; the standard library alone."""

from __future__ import annotations

import contextlib
import json
import threading
import urllib.request
from collections.abc import Iterator, Sequence


@contextlib.contextmanager
def traffic(url: str, asked: Sequence[tuple[str, str]]) -> Iterator[None]:
    """Streams of models, each with a key or '', until the end of the block."""
    is_over = threading.Event()
    threads = [
        threading.Thread(target=_stream, args=(url, model, key, number, is_over))
        for number, (model, key) in enumerate(asked)
    ]
    for each in threads:
        each.start()
    try:
        yield
    finally:
        is_over.set()
        for each in threads:
            each.join()


def _stream(url: str, model: str, key: str, number: int, is_over: threading.Event) -> None:
    """Ask again and again; to leave a stream ends its request."""
    body = {
        "model": model,
        "prompt": f"{number} ships sailed",
        "max_tokens": 400,
        "stream": True,
        "ignore_eos": True,
    }
    headers = {"Content-Type": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), headers)
    while not is_over.is_set():
        with urllib.request.urlopen(request, timeout=600) as response:
            for _ in response:
                if is_over.is_set():
                    break
