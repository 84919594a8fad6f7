"""All keys of a server: those of flags, and those of a file that is read again when it changes."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from lorax_contract.config import ConfigError
from lorax_contract.words import counted
from lorax_router.service.callers import ANYBODY, Caller
from lorax_router.service.keys.keyring import Keyring
from lorax_router.service.keys.tenants import (
    ADMIN_TENANT,
    DEFAULT_TENANT,
    METRICS_TENANT,
    parse_tenants,
)
from lorax_router.service.keys.watch import FileWatch

logger = logging.getLogger(__name__)

_MAX_FILE_BYTES = 16 << 20


class KeyStore:
    """Says whom a call is from, by the keys that it presents.

    Args:
        api_keys, admin_keys, metrics_keys: hashes of the keys that flags gave.
        path: the file of tenants; None: there is none.
    """

    def __init__(
        self,
        *,
        api_keys: Iterable[str] = (),
        admin_keys: Iterable[str] = (),
        metrics_keys: Iterable[str] = (),
        path: str | None = None,
    ) -> None:
        # Where a key was given for several things it is good for the most that it was given for.
        self._of_flags = {
            **dict.fromkeys(metrics_keys, Caller(tenant=METRICS_TENANT, only_metrics=True)),
            **dict.fromkeys(api_keys, Caller(tenant=DEFAULT_TENANT)),
            **dict.fromkeys(admin_keys, Caller(tenant=ADMIN_TENANT, is_admin=True)),
        }
        self._path = path
        self._watch = FileWatch([] if path is None else [path], self._read_again)
        self._ring = self._read()

    @property
    def is_on(self) -> bool:
        """Whether callers need a key."""
        return self._path is not None or any(
            not each.only_metrics for each in self._of_flags.values()
        )

    @property
    def has_metrics_key(self) -> bool:
        """Whether there is a key for the metrics alone."""
        return any(each.only_metrics for each in self._of_flags.values())

    @property
    def num_keys(self) -> int:
        """How many keys are known."""
        return len(self._ring)

    def caller(self, keys: Iterable[str]) -> Caller:
        """Return who presents some keys; UnauthenticatedError for nobody that is known."""
        return self._ring.require(keys) if self.is_on else ANYBODY

    def reader(self, keys: Iterable[str]) -> Caller:
        """Return who wants to read the metrics; without any key for them that is anybody."""
        return self._ring.require(keys) if len(self._ring) else ANYBODY

    def check(self) -> None:
        """Read the file again if it has changed."""
        self._watch.check()

    async def follow(self) -> None:
        """Read the file again whenever it changes, until cancelled."""
        await self._watch.follow()

    def _read(self) -> Keyring:
        """Read all keys; raises ConfigError, which names no key."""
        if self._path is None:
            return Keyring(self._of_flags)
        try:
            callers = parse_tenants(_text_of(self._path))
        except ConfigError as error:
            raise ConfigError(f"api_keys_file: {self._path}: {error}") from None
        if callers.keys() & self._of_flags.keys():
            raise ConfigError(
                f"api_keys_file: {self._path}: a key in it is given by a flag as well; it can "
                "stand for one of them only"
            )
        return Keyring({**self._of_flags, **callers})

    def _read_again(self) -> None:
        try:
            self._ring = self._read()
        except ConfigError as error:
            logger.error("the keys stay as they were: %s", error)
        else:
            logger.info("the keys were read again: %s", counted(len(self._ring), "key"))


def _text_of(path: str) -> str:
    try:
        with Path(path).open("rb") as file:
            raw = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"it cannot be read: {error.strerror or error}") from None
    if len(raw) > _MAX_FILE_BYTES:
        raise ConfigError(f"it is larger than {_MAX_FILE_BYTES} bytes")
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise ConfigError("it is not UTF-8") from None
