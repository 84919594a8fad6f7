"""The event that an adapter made room for others, on the disk or in host memory."""

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)


def log_eviction(level: str, digest: str, nbytes: int) -> None:
    """Tell that what has this digest left a level (``disk``, ``host``), and what that freed."""
    fields = {"event": "adapter_evicted", "level": level, "digest": digest, "bytes": nbytes}
    logger.info(
        "an adapter of %d bytes left the %s for others", nbytes, _PLACES[level],
        extra={"fields": fields},
    )  # fmt: skip


_PLACES = {"disk": "disk", "host": "host's memory"}
