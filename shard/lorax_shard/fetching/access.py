"""Who was let in to adapters that need a caller's token, remembered for a limited time."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable

from lorax_contract.adapters import AdapterRef


class AccessBook:
    """Acceptances per (token hash, adapter). Holds no token, and no hash that outlives it."""

    def __init__(
        self,
        lifetime_s: float,
        *,
        max_entries: int = 65_536,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._lifetime_s = lifetime_s
        self._max_entries = max_entries
        self._now = now
        # Keyed, so that a dump of this table cannot be compared with known tokens.
        self._secret = secrets.token_bytes(32)
        # Time of acceptance, oldest first.
        self._accepted: OrderedDict[tuple[str, str], float] = OrderedDict()

    def hash(self, token: str | None) -> str:
        """Return what stands for a token in this process; no token has the empty name."""
        if token is None:
            return ""
        return hmac.new(self._secret, token.encode(), hashlib.sha256).hexdigest()

    def accept(self, ref: AdapterRef, token: str) -> None:
        """Note that the source let this token in just now."""
        key = (self.hash(token), ref.key)
        self._accepted[key] = self._now()
        self._accepted.move_to_end(key)
        while len(self._accepted) > self._max_entries:
            self._accepted.popitem(last=False)

    def is_accepted(self, ref: AdapterRef, token: str | None) -> bool:
        """Tell whether the source let this token in not long ago."""
        return self.remaining_s(ref, token) > 0.0

    def remaining_s(self, ref: AdapterRef, token: str | None) -> float:
        """Return for how long this token is let in without asking the source; 0: it is not."""
        if token is None:
            return 0.0
        key = (self.hash(token), ref.key)
        since = self._accepted.get(key)
        if since is None:
            return 0.0
        left = since + self._lifetime_s - self._now()
        if left <= 0.0:
            del self._accepted[key]
        return max(left, 0.0)

    def refuse(self, ref: AdapterRef, token: str | None) -> None:
        """Forget an acceptance: the source let this token in no more."""
        self._accepted.pop((self.hash(token), ref.key), None)

    def forget(self, ref: AdapterRef) -> None:
        """Forget everybody who was let in to an adapter."""
        for key in [key for key in self._accepted if key[1] == ref.key]:
            del self._accepted[key]
