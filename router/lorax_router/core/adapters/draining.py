"""Which adapter in use gives its slot to one that waits."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

from lorax_router.core.adapters.record import AdapterRecord


class DrainChoice(Protocol):
    """Says which adapter is drained for one that waits."""

    def __call__(
        self,
        record: AdapterRecord,
        candidates: Sequence[AdapterRecord],
        held: Collection[AdapterRecord],
        /,
        *,
        has_waited: bool,
    ) -> AdapterRecord | None:
        """Return one of ``candidates``, the one resident longest comes first; None: nobody.

        ``held`` are all that hold a slot. Before the one that waits ``has_waited`` for its
        cycle, whoever is named gives its slot at once.
        """


def longest_resident(
    _record: AdapterRecord,
    candidates: Sequence[AdapterRecord],
    _held: Collection[AdapterRecord],
    *,
    has_waited: bool,
) -> AdapterRecord | None:
    """Name the adapter that has been resident longest, once the other has waited."""
    return candidates[0] if has_waited and candidates else None
