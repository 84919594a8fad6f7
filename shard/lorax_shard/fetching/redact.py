"""Texts without secrets."""

from __future__ import annotations

import re
from collections.abc import Iterable


def without_secrets(text: str, secrets: Iterable[str | None]) -> str:
    """Return ``text`` without the given secrets and without the queries of URLs.

    Queries hold the signatures of presigned addresses.
    """
    for secret in secrets:
        if secret:
            text = text.replace(secret, "***")
    return re.sub(r"(https?://)(?:[^\s/@]*@)?([^\s?]+)\?\S+", r"\1\2", text)
