"""The ids of new spans."""

from __future__ import annotations

import secrets
from dataclasses import replace

from lorax_contract.tracing import TraceContext


def new_root() -> TraceContext:
    """Return the context of a span that begins a trace."""
    return TraceContext(secrets.token_hex(16), secrets.token_hex(8))


def child_of(parent: TraceContext) -> TraceContext:
    """Return the context of a new span within another one."""
    return replace(parent, span_id=secrets.token_hex(8))
