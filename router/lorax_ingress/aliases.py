"""Names of operators' choosing, as replicas tell them: which there are, and what they stand for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lorax_contract.adapters import ALIAS_SOURCE, AdapterRef
from lorax_router.service.adapters.aliases import Alias, AliasBook
from lorax_router.service.adapters.catalog import AdapterSelection


class ReplicaAliases:
    """The names of all replicas. What one means is each replica's affair: here it is where to go."""

    def __init__(self) -> None:
        # Those that some replica knows.
        self.book = AliasBook()
        # By replica: what each name stands for.
        self._targets: dict[str, dict[str, str]] = {}

    def stands_for(self, name: str) -> str | None:
        """Return the adapter that a name stands for, as whoever told it first has it."""
        found = (own[name] for own in self._targets.values() if name in own)
        return next(found, None)

    def tell(
        self, replica: str, known: Sequence[str], dropped: Iterable[str], targets: Sequence[str]
    ) -> None:
        """Names mean an adapter at a replica from now on, or do no more.

        A replica that tells no targets knows nothing of them: its names stand for themselves.
        """
        own = self._targets.setdefault(replica, {})
        own.update(zip(known, targets or known, strict=True))
        for each in known:
            ref = AdapterRef(source=ALIAS_SOURCE, id=each)
            self.book.put(Alias(name=each, target=AdapterSelection(refs=(ref,))))
        for each in dropped:
            own.pop(each, None)
            if self.stands_for(each) is None:
                self.book.drop(each)

    def forget(self, replica: str) -> None:
        """A replica is gone."""
        if replica in self._targets:
            self.tell(replica, [], [*self._targets[replica]], [])
            del self._targets[replica]
