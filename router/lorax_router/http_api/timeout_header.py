"""How long a client waits for its answer, as the heads of requests say it."""

from __future__ import annotations

from starlette.requests import Request

from lorax_contract.errors import BadRequestError

# Seconds, with decimals.
TIMEOUT = "x-request-timeout"
# Milliseconds: what Envoy, and gateways made of it, tell the server behind of their own.
_ENVOY = "x-envoy-expected-rq-timeout-ms"
_UNITS = ((TIMEOUT, 1.0), (_ENVOY, 1e-3))


def timeout_of(request: Request) -> float | None:
    """Return the seconds within which the last byte is wanted; None: the client waits.

    The least of several counts. Raises BadRequestError.
    """
    given = [
        _seconds(name, text) * unit
        for name, unit in _UNITS
        for text in request.headers.getlist(name)
    ]
    return min(given, default=None)


def _seconds(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < 1e9:
        raise BadRequestError(f"the header {name} must be a number above 0")
    return value
