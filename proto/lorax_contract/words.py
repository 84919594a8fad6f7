"""Small pieces of the sentences that people read."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: ``1 adapter``, ``2 adapters``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
