"""Texts without secrets."""

from __future__ import annotations

import re
from collections.abc import Iterable


def without_secrets(text: str, secrets: Iterable[str | None]) -> str:
    """Return ``text`` without the given secrets and without what else URLs may hide.

    Queries hold the signatures of presigned addresses, and what comes before an ``@`` is a password.
    """
    for secret in secrets:
        if secret:
            text = text.replace(secret, "***")
    text = re.sub(r"(https?://)[^\s/?#]*@", r"\1", text)
    return re.sub(r"(https?://[^\s?]+)\?\S+", r"\1", text)
