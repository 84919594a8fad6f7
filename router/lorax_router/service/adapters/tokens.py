"""Which tokens opened private adapters for which tenant: by them its lists are made."""

from __future__ import annotations

from cachetools import LRUCache

from lorax_router.service.callers import Caller

_MAX_TENANTS = 4_096
# Of a tenant; one that is not used for long gives way.
_MAX_TOKENS = 16


class TenantTokens:
    """Remembers tokens that a source accepted, in memory only.

    Without keys nobody is told from others, and nothing is remembered.
    """

    def __init__(self) -> None:
        self._tokens: LRUCache[str, LRUCache[str, None]] = LRUCache(_MAX_TENANTS)

    def opened(self, caller: Caller, token: str | None) -> None:
        """A source let a caller have an adapter by a token."""
        if not caller.has_key or token is None:
            return
        tokens = self._tokens.get(caller.tenant)
        if tokens is None:
            tokens = self._tokens[caller.tenant] = LRUCache(_MAX_TOKENS)
        tokens[token] = None

    def of(self, caller: Caller, presented: str | None = None) -> tuple[str, ...]:
        """The tokens whose adapters a caller may know of: what they present, and their tenant's."""
        remembered = self._tokens.get(caller.tenant, ()) if caller.has_key else ()
        return tuple(dict.fromkeys(each for each in (presented, *remembered) if each))
