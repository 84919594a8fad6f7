"""The last word of a start: where the server is, and a request to copy."""

from __future__ import annotations

import json
import shlex
from urllib.parse import urlsplit, urlunsplit

_EVERYWHERE = {"0.0.0.0": "localhost", "::": "[::1]"}


def ready_lines(url: str, model_id: str) -> list[str]:
    """Return the ready line and a curl line that asks the model a question."""
    url = reachable(url)
    body = {
        "inputs": "What is the capital of France?",
        "parameters": {"max_new_tokens": 32, "apply_chat_template": True},
    }
    curl = (
        f"curl {shlex.quote(url + '/generate')} -H 'Content-Type: application/json' "
        f"-d {shlex.quote(json.dumps(body))}"
    )
    return [f"Ready: {model_id} answers on {url}", curl]


def reachable(url: str) -> str:
    """Replace an address that means "all interfaces" by one that a client can use."""
    parts = urlsplit(url)
    host = _EVERYWHERE.get(parts.hostname or "")
    if host is None:
        return url.rstrip("/")
    return urlunsplit(parts._replace(netloc=f"{host}:{parts.port}")).rstrip("/")
