"""Events in the log: lines with fields, one of which names what happened."""

from __future__ import annotations

from typing import Any

import pytest


def events_in(caplog: pytest.LogCaptureFixture, name: str) -> list[dict[str, Any]]:
    """Return the fields of all lines of an event."""
    found: list[dict[str, Any]] = [getattr(each, "fields", {}) for each in caplog.records]
    return [fields for fields in found if fields.get("event") == name]
