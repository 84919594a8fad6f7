"""Callers' tokens: which can be sent, and what stands for one in memory."""

from __future__ import annotations

import hashlib
import hmac
import secrets

from lorax_contract.adapters import refused

_MAX_LENGTH = 4096


def checked(token: str | None) -> str | None:
    """Return a token that can be sent; an empty one is none."""
    if not token:
        return None
    if len(token) > _MAX_LENGTH or not token.isascii() or not token.isprintable():
        raise refused("the api_token has characters that no token has, or is too long")
    if " " in token:
        raise refused("the api_token has spaces, which no token has")
    return token


class TokenHash:
    """Tells tokens apart in one process. Keyed, so that a dump cannot be compared with others."""

    def __init__(self) -> None:
        self._secret = secrets.token_bytes(32)

    def __call__(self, token: str | None) -> str:
        """Return what stands for a token; no token has the empty name."""
        if token is None:
            return ""
        return hmac.new(self._secret, token.encode(), hashlib.sha256).hexdigest()
