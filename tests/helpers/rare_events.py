"""What long runs of the scheduler's state machine must have met, whatever was drawn."""

from __future__ import annotations

from collections.abc import Mapping


def verify_rare_events(counts: Mapping[str, int], policy: str, num_host_blocks: int) -> None:
    """Assert that each kind of event was among those that were counted."""
    assert counts["refused"] > 0 and counts["late"] > 0
    # Where all that a request may need is kept for it, nobody gives way for memory.
    assert counts["preemptions"] > 0 or policy == "lorax"
    assert counts["inactive"] > 0
    assert counts["shared blocks"] > 0
    assert counts["prompts only"] > 0
    assert bool(num_host_blocks) == bool(counts["swaps"]) == bool(counts["brought back"])
    assert counts["failed passes"] > 0
    assert counts["plans behind"] > 0
