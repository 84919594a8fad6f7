"""What names led to when the shards were last asked, for as long as that holds."""

from __future__ import annotations

import hashlib
import secrets
from collections import OrderedDict
from collections.abc import Callable

from lorax_contract.adapters import AdapterQuery, AdapterRef, FetchedAdapter


class AnswerBook:
    """Answers by name, and by the caller's token where access takes one. Holds no token."""

    def __init__(self, max_entries: int, clock: Callable[[], float]) -> None:
        self._max_entries = max_entries
        self._clock = clock
        # Keyed, so that a dump of this table cannot be compared with known tokens.
        self._secret = secrets.token_bytes(32)
        # Until when an answer holds; least recently written first.
        self._answers: OrderedDict[tuple[str, str], tuple[float, FetchedAdapter]] = OrderedDict()

    def find(self, query: AdapterQuery) -> FetchedAdapter | None:
        """Return the answer that this caller may have without asking."""
        for key in self._keys(query):
            answer = self._answers.get(key)
            if answer is not None and answer[0] > self._clock():
                return answer[1]
        return None

    def note(self, query: AdapterQuery, fetched: FetchedAdapter) -> None:
        """Take an answer in."""
        everybody, *caller = self._keys(query)
        key = everybody
        if fetched.access == "token":
            if not caller:
                return
            key = caller[0]
            # What everybody could have is not theirs any more.
            self._answers.pop(everybody, None)
        self._answers[key] = (self._clock() + fetched.valid_s, fetched)
        self._answers.move_to_end(key)
        while len(self._answers) > self._max_entries:
            self._answers.popitem(last=False)

    def forget(self, ref: AdapterRef) -> None:
        """Ask for a name anew, whoever comes."""
        for key in [key for key in self._answers if key[0] == ref.key]:
            del self._answers[key]

    def _keys(self, query: AdapterQuery) -> list[tuple[str, str]]:
        """Where an answer to this caller may lie: for everybody, or for this token."""
        keys = [(query.ref.key, "")]
        if query.token is not None:
            hashed = hashlib.blake2b(query.token.encode(), key=self._secret).hexdigest()
            keys.append((query.ref.key, hashed))
        return keys
