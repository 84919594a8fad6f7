"""Adapter contents by short names."""

from __future__ import annotations

from lorax_contract.adapters import AdapterContent, AdapterPart


def content(digest: str) -> AdapterContent:
    """A content of one stored adapter."""
    return AdapterContent(parts=(AdapterPart(digest, f"files of {digest}"),))
