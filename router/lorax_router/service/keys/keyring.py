"""Keys as hashes, and whom each stands for. Nothing here can give a key away: none is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from hmac import compare_digest

from lorax_contract.errors import UnauthenticatedError
from lorax_contract.keys import hash_of
from lorax_router.service.callers import Caller

# Of a hash in hexadecimal; enough that no two keys share one.
_INDEXED = 32


class Keyring:
    """Which hash stands for whom. Never changes: keys that are read again are a new one."""

    def __init__(self, callers: Mapping[str, Caller]) -> None:
        self._by_index = {each[:_INDEXED]: (each, caller) for each, caller in callers.items()}

    def __len__(self) -> int:
        return len(self._by_index)

    def find(self, key: str) -> Caller | None:
        """Return whom a key stands for.

        How long that takes depends on the hash alone, and no key is known to be near another by
        its hash: neither which key it is nor how much of it is right can be measured.
        """
        wanted = hash_of(key)
        known, caller = self._by_index.get(wanted[:_INDEXED], ("", None))
        return caller if compare_digest(known, wanted) else None

    def require(self, keys: Iterable[str]) -> Caller:
        """Return whom the first known one of some keys stands for; UnauthenticatedError if none."""
        presented = [key for key in keys if key]
        for key in presented:
            if (caller := self.find(key)) is not None:
                return caller
        if presented:
            raise UnauthenticatedError("this API key is not known here")
        raise UnauthenticatedError(
            "an API key is needed: send it as `Authorization: Bearer ...` or as `x-api-key`"
        )


def keys_in(get: Callable[[str], str | None]) -> list[str]:
    """Return the keys that headers, or gRPC's metadata, present; ``get`` looks one up by name."""
    scheme, _, token = (get("authorization") or "").partition(" ")
    bearer = token.strip() if scheme.lower() == "bearer" else ""
    return [each for each in (bearer, (get("x-api-key") or "").strip()) if each]
