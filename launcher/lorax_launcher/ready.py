"""The last word of a start: where the server is, and a request to copy."""

from __future__ import annotations

import ipaddress
import json
import shlex
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit, urlunsplit

_QUESTION = "What is the capital of France?"
# By what a model does, the best first: where it is asked, and what.
_EXAMPLES: dict[str, tuple[str, dict[str, Any]]] = {
    "generate": (
        "/generate",
        {
            "inputs": _QUESTION,
            "parameters": {"max_new_tokens": 32, "apply_chat_template": True},
        },
    ),
    "classify": ("/classify", {"inputs": "I loved it"}),
    "embed": ("/embed", {"inputs": _QUESTION}),
}
_EVERYWHERE = {"0.0.0.0": "localhost", "::": "[::1]"}


def ready_lines(
    url: str,
    model_id: str,
    *,
    origins: Sequence[str] = (),
    admin: Sequence[str] = (),
    has_keys: bool = False,
    metrics: str | None = None,
    tasks: Sequence[str] = ("generate",),
) -> list[str]:
    """Return the ready line: who may call, where it is managed, and a request to copy.

    ``origins`` are those whose pages may call, ``admin`` the addresses of the management,
    ``metrics`` is where the metrics are alone, ``tasks`` are what the model does, as ``/info`` has
    them.
    """
    keys = ", with a key" if has_keys else ""
    callers = f"{_callers(url)}{keys}, {_pages(origins)}"
    url = reachable(url)
    path, body = next(each for task, each in _EXAMPLES.items() if task in (*tasks, "embed"))
    key = '-H "Authorization: Bearer $LORAX_API_KEY" ' if has_keys else ""
    curl = (
        f"curl {shlex.quote(url + path)} {key}-H 'Content-Type: application/json' "
        f"-d {shlex.quote(json.dumps(body))}"
    )
    beside = [f"Adapters are managed {_how(address)}" for address in admin]
    if metrics is not None:
        beside.append(f"Metrics are on {reachable(metrics)}")
    return [f"Ready: {model_id} answers on {url} ({callers})", *beside, curl]


def _callers(url: str) -> str:
    """Say who can reach an address."""
    host = urlsplit(url).hostname or ""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return f"all who reach {host}"
    if address.is_loopback:
        return "this machine only"
    return "all machines that reach it" if address.is_unspecified else f"all who reach {host}"


def _pages(origins: Sequence[str]) -> str:
    if not origins:
        return "no pages of other origins"
    return "pages of any origin" if "*" in origins else f"pages of {', '.join(origins)}"


def _how(address: str) -> str:
    if address.startswith("unix:"):
        path = shlex.quote(address.removeprefix("unix:"))
        return f"with curl --unix-socket {path} http://localhost/v1/adapters"
    return f"on {address}/v1/adapters, from this machine only"


def reachable(url: str) -> str:
    """Replace an address that means "all interfaces" by one that a client can use."""
    parts = urlsplit(url)
    host = _EVERYWHERE.get(parts.hostname or "")
    if host is None:
        return url.rstrip("/")
    return urlunsplit(parts._replace(netloc=f"{host}:{parts.port}")).rstrip("/")
