"""Takes over what was managed by hand at another server, or here before this one began."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace

from lorax_contract.adapters import TOKEN_SOURCES, AdapterRef
from lorax_contract.errors import LoraxError, ValidationError
from lorax_contract.hub import hub_token
from lorax_router.service.adapters.aliases import Alias, AliasBook
from lorax_router.service.adapters.catalog import AdapterSelection
from lorax_router.service.adapters.managed import ManagedAdapters, ManagedName, TakenBack
from lorax_router.service.adapters.management import AdapterManager
from lorax_router.service.adapters.registry import Pin
from lorax_router.service.callers import OPERATOR, Caller

logger = logging.getLogger(__name__)


class ManagedKeeper:
    """Says what was managed by hand here, and takes over what was elsewhere.

    Args:
        adapters: manages those of this server.
        aliases: its names.
    """

    def __init__(self, adapters: AdapterManager, aliases: AliasBook) -> None:
        self._adapters = adapters
        self._aliases = aliases

    async def known(self) -> ManagedAdapters:
        """Return what was managed by hand, as far as it still holds."""
        return ManagedAdapters.of(await asyncio.to_thread(self._adapters.registry.read))

    async def take_back(self, gone: TakenBack, elsewhere: ManagedAdapters) -> None:
        """Let go of what was taken back while this server was away, unless it holds elsewhere.

        Names go before anything is waited for.
        """
        dropped = [
            alias for name, created_at in gone.names.items()
            if (alias := self._aliases.find(name)) is not None and alias.created_at <= created_at
        ]  # fmt: skip
        for alias in dropped:
            self._aliases.drop(alias.name)
        for alias in dropped:
            await self._unload(alias.ref)
            await self._adapters.registry.unloaded(alias.ref, alias)
        own = await self.known()
        for pin in gone.pins:
            if pin in own.pins:
                await self._unpin(pin)
        held = {pin.ref for pin in elsewhere.pins}
        for ref in gone.loads:
            if ref in own.loads and ref not in held:
                await self._unload(ref)
                await self._adapters.registry.unloaded(ref)

    async def _unpin(self, pin: Pin) -> None:
        caller = Caller(tenant=pin.tenant)
        with suppress(LoraxError):
            await self._adapters.unpin(AdapterSelection(refs=(pin.ref,)), caller)
        await self._adapters.registry.unpinned(pin.ref, pin.tenant)

    async def _unload(self, ref: AdapterRef) -> None:
        # It may not be there at all.
        with suppress(LoraxError):
            await self._adapters.unload(AdapterSelection(refs=(ref,)))

    def take_names(self, names: Iterable[ManagedName]) -> list[Alias]:
        """Let names stand for what they stand for elsewhere; the younger of two of one name stays.

        Done when it returns. Returns those that are new here.
        """
        taken = []
        for each in names:
            known = self._aliases.find(each.name)
            if known is not None and known.created_at >= each.created_at:
                continue
            target = AdapterSelection(refs=(each.ref,))
            alias = Alias(name=each.name, target=target, created_at=each.created_at)
            if (put := put_name(self._aliases, alias, is_private=each.is_private)) is not None:
                taken.append(put)
        return taken

    async def take_rest(self, taken: Iterable[Alias], managed: ManagedAdapters) -> None:
        """Remember names that were taken over, pin and load the rest, one after the other.

        What cannot be had is told in the log.
        """
        registry = self._adapters.registry
        for alias in taken:
            await registry.named(alias)
        own = await self.known()
        for pin in managed.pins:
            if pin not in own.pins:
                await pin_again(self._adapters, pin, remember=True)
        pinned = {pin.ref for pin in managed.pins}
        for ref in managed.loads:
            if ref not in pinned and ref not in own.loads:
                await load_again(self._adapters, ref, OPERATOR, pin=False, remember=True)


def put_name(aliases: AliasBook, alias: Alias, *, is_private: bool) -> Alias | None:
    """Let a name that was told without its token stand again; None: it can be none here."""
    token = hub_token() if alias.target.refs[0].source in TOKEN_SOURCES else None
    if is_private and token is None:
        logger.warning(
            "the name %s stands for a private adapter whose token is not kept: give the name again "
            "with the token if its source asks for it", alias.name,
        )  # fmt: skip
    try:
        checked = aliases.make(alias.name, replace(alias.target, token=token))
        put = replace(checked, created_at=alias.created_at)
        aliases.put(put)
    except ValidationError as error:
        logger.warning("the name %s is given up: %s", alias.name, error)
        return None
    return put


async def pin_again(adapters: AdapterManager, pin: Pin, *, remember: bool = False) -> None:
    """Pin an adapter for whoever had it pinned; a tenant's with no token, since its own is not kept."""
    if pin.tenant and pin.is_private:
        logger.warning("private adapter %s is not pinned again: its token is not kept", pin.ref)
        return
    caller = Caller(tenant=pin.tenant, is_admin=True)
    await load_again(adapters, pin.ref, caller, pin=True, remember=remember)


async def load_again(
    adapters: AdapterManager, ref: AdapterRef, caller: Caller, *, pin: bool, remember: bool = False
) -> None:
    """Load an adapter that was loaded before; what is wrong with it is told in the log."""
    # The server's own is for the operator alone.
    is_own = not caller.tenant and ref.source in TOKEN_SOURCES
    selection = AdapterSelection(refs=(ref,), token=hub_token() if is_own else None)
    try:
        await adapters.load(selection, caller, pin=pin, remember=remember)
    except Exception as error:  # noqa: BLE001 - whatever it is, the server serves without it
        logger.warning("adapter %s, which was loaded before, is not there: %s", ref, error)
