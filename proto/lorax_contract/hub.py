"""The server's own token for the hub: which variables may hold it."""

from __future__ import annotations

import os
from collections.abc import Mapping

# The first one that is set counts.
TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_API_TOKEN")


def hub_token(environment: Mapping[str, str] = os.environ) -> str | None:
    """Return the token, a secret; None when there is none."""
    tokens = (environment.get(name, "").strip() for name in TOKEN_VARIABLES)
    return next(filter(None, tokens), None)
