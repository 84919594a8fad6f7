"""What was managed by hand, as an ingress knows it of the replicas, and tells those that come later."""

from __future__ import annotations

from collections.abc import Iterable

from lorax_router.service.adapters.managed import ManagedChange, ManagedKey, ManagedKind

# What is remembered; what was taken back first goes first.
_MAX_KEPT = 16_384
# What one call did at several replicas is no further apart than so many seconds.
_SAME_S = 5.0


class ManagedBook:
    """The last change of everything that replicas told of; no tokens.

    Each ingress has one, and replicas have what is true: whatever an ingress does not know yet, the
    next replica that it asks does.

    Args:
        max_kept: so many changes at most.
    """

    def __init__(self, max_kept: int = _MAX_KEPT) -> None:
        self._max_kept = max_kept
        self._changes: dict[ManagedKey, ManagedChange] = {}

    def all(self) -> list[ManagedChange]:
        """Return what every replica is to know."""
        return [*self._changes.values()]

    def told(self, changes: Iterable[ManagedChange]) -> list[ManagedChange]:
        """Take over what a replica told; returns what the others may not know.

        What the same call did there a moment later is none of that.
        """
        news = []
        for each in changes:
            known = self._changes.get(each.key)
            if known is not None and known.at >= each.at:
                continue
            self._changes[each.key] = each
            if known is None or not _is_same(known, each):
                news.append(each)
        self._bound()
        return news

    def _bound(self) -> None:
        num = len(self._changes) - self._max_kept
        if num > 0:
            for each in sorted(self._changes.values(), key=_worth)[:num]:
                del self._changes[each.key]


def _is_same(one: ManagedChange, other: ManagedChange) -> bool:
    is_alike = (one.holds, one.target) == (other.holds, other.target)
    return is_alike and abs(one.at - other.at) <= _SAME_S


def _worth(change: ManagedChange) -> tuple[bool, float]:
    """Order changes by how little is lost with them."""
    return change.holds and change.kind is not ManagedKind.RELOAD, change.at
