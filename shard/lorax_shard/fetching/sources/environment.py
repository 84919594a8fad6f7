"""Which sources this process has: what it was told, and what its environment says."""

from __future__ import annotations

import os
from collections.abc import Iterable

from lorax_shard.fetching.sources.interface import SourceSettings

_TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_API_TOKEN")


def source_settings(
    local_roots: Iterable[str], s3_roots: Iterable[str], s3_endpoint: str | None
) -> SourceSettings:
    """Return the settings of all sources; the server's own token, a secret, is in the environment."""
    shared = os.environ.get("LORAX_USE_GLOBAL_HF_TOKEN", "").lower() in ("1", "true", "yes")
    tokens = (os.environ.get(name, "").strip() for name in _TOKEN_VARIABLES)
    token = next(filter(None, tokens), None)
    offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
    return SourceSettings(
        local_roots=tuple(local_roots),
        hub_endpoint=os.environ.get("HF_ENDPOINT") or None,
        offline=offline,
        s3_roots=tuple(s3_roots),
        s3_endpoint=s3_endpoint,
        server_token=token if shared else None,
    )
