"""How a request came here. Said once, by a front end; logs and spans show it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """By which call a request came, and what its caller said of it. Never a secret."""

    # http or grpc; "": by neither.
    protocol: str = ""
    # The path, or the method.
    call: str = ""
    # What the caller names it; "": nothing.
    request_id: str = ""
    # The headers of W3C's trace context as they came.
    traceparent: str = ""
    tracestate: str = ""


# Of what no front end brought.
NOWHERE = Origin()
