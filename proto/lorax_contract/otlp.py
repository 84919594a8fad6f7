"""Where spans are sent, checked without any package that sends them."""

from __future__ import annotations

from importlib.util import find_spec
from urllib.parse import urlsplit

# What a process needs that sends spans, by pip's names of it.
EXTRA = "lorax-py[otel]"
_MODULES = (
    "opentelemetry.sdk.trace",
    "opentelemetry.exporter.otlp.proto.grpc",
    "opentelemetry.exporter.otlp.proto.http",
)


def endpoint_problem(url: str) -> str | None:
    """Return what is wrong with the address of a collector, or with this installation; None: nothing."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return f"{url!r} is no address of a collector; give one like http://localhost:4317"
    if parts.username or parts.password:
        return "secrets do not belong into the address; set OTEL_EXPORTER_OTLP_HEADERS instead"
    if not all(map(_is_installed, _MODULES)):
        return (
            f'traces need OpenTelemetry\'s packages, which are not installed: pip install "{EXTRA}"'
        )
    return None


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False
