"""Who asks. Decided once, by a front end; everything behind it takes a Caller at its word."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

from lorax_contract.adapters import (
    ALIAS_SOURCE,
    SOURCES,
    AdapterRef,
    AdapterUnavailableError,
    Reason,
)
from lorax_contract.errors import ForbiddenError
from lorax_router.core.tenant_limits import TenantLimits

_LIMITS = ("queued_requests", "queued_tokens", "kv_share", "adapter_share")


@dataclass(frozen=True, slots=True, kw_only=True)
class Quotas:
    """What a tenant may take; None: as much as there is."""

    # Calls that generate or tokenize.
    requests_per_minute: int | None = None
    # Of prompts and outputs together.
    tokens_per_minute: int | None = None
    # Times that a source of adapters is asked for the tenant.
    fetches_per_minute: int | None = None
    # Of adapters' files that were stored for the tenant.
    store_bytes: int | None = None
    # Adapters that the tenant may keep on the shards.
    pins: int = 0
    # What it may have waiting and may hold, by TenantLimits' names.
    queued_requests: int | None = None
    queued_tokens: int | None = None
    kv_share: float | None = None
    adapter_share: float | None = None
    # Adapters that are fetched for it at once; more wait.
    concurrent_fetches: int | None = None

    def limits(self, defaults: TenantLimits) -> TenantLimits:
        """Return what the tenant may have waiting and may hold; where nothing is said, a default."""
        said = {name: each for name in _LIMITS if (each := getattr(self, name)) is not None}
        return replace(defaults, **said) if said else defaults


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """One who asks, with what they may do. Never holds a key."""

    # Of whom the quotas are; empty: the server has no keys, and nobody is told from others.
    tenant: str = ""
    # May manage the server, adapters above all.
    is_admin: bool = False
    may_read_metrics: bool = True
    # A key for the metrics, and nothing else.
    only_metrics: bool = False
    # A smaller one goes first, where the scheduling policy goes by it.
    priority: int = 0
    # The tenant's share beside those of others, where the scheduling policy is fair.
    weight: float = 1.0
    quotas: Quotas = field(default_factory=Quotas)
    # Patterns of the adapters that exist for this caller; None: all.
    adapters: tuple[str, ...] | None = None
    # For private adapters, where a request brings none. A secret: never part of a repr.
    api_token: str | None = field(default=None, repr=False)

    @property
    def has_key(self) -> bool:
        """Whether a key told who it is; then what else the request brings is no key."""
        return bool(self.tenant)

    def sees(self, ref: AdapterRef) -> bool:
        """Whether an adapter of this name can exist for the caller. Nothing is looked up."""
        return self.adapters is None or any(matches(each, ref) for each in self.adapters)

    def check_sees(self, refs: Iterable[AdapterRef]) -> None:
        """Raise what an adapter that does not exist gets, for the first name out of bounds.

        Comes before anything is asked or looked up: so neither the answer nor its time can
        depend on what exists.
        """
        for ref in refs:
            if not self.sees(ref):
                # By the name that was asked for: where it leads to would tell what exists.
                raise AdapterUnavailableError(
                    Reason.NOT_FOUND, f"there is no adapter {ref.spoken!r} that this key may use"
                )

    def check_admin(self) -> None:
        """Raise ForbiddenError unless the caller may manage the server."""
        if self.is_admin:
            return
        if not self.has_key:
            raise ForbiddenError(
                "adapters are managed on a listener of their own: the unix socket that the server "
                "names when it is ready, or --admin-port"
            )
        raise ForbiddenError("this key may not do that: it takes an admin key")


# All callers of a server without keys.
ANYBODY = Caller()
# Whoever manages the server from its own machine, on a listener that asks for no key.
OPERATOR = Caller(is_admin=True)
# The same where the server has keys elsewhere: a Bearer token may be one by mistake.
KEYED_OPERATOR = Caller(tenant="operator", is_admin=True)


def matches(pattern: str, ref: AdapterRef) -> bool:
    """Whether a pattern names an adapter: ``acme-*`` of all sources, ``hub:acme/*`` of one.

    ``*`` stands for any characters, ``?`` for one. Revisions do not count.
    """
    name = ref.plain.id.removeprefix("s3://")
    if ".." in name.split("/"):
        # It would leave what the pattern names.
        return False
    source, colon, rest = pattern.partition(":")
    if colon and source in (*SOURCES, ALIAS_SOURCE):
        if source != ref.source:
            return False
        pattern = rest.removeprefix("//")
    return fnmatchcase(name, pattern)
