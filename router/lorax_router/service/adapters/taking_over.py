"""Takes over what was managed by hand at another server, or here before this one began."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Coroutine, Iterable
from dataclasses import replace
from typing import Any

from lorax_contract.adapters import TOKEN_SOURCES, AdapterRef
from lorax_contract.errors import LoraxError, ValidationError
from lorax_contract.hub import hub_token
from lorax_router.service.adapters.aliases import Alias, AliasBook
from lorax_router.service.adapters.catalog import AdapterSelection
from lorax_router.service.adapters.managed import ManagedChange, ManagedKind, ManagedKnown, Taken
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
        self._following: set[asyncio.Task[None]] = set()

    def known(self, since: float) -> ManagedKnown:
        """Return the last that was done about everything, as far as that was since a Unix time."""
        registry = self._adapters.registry
        return ManagedKnown(changes=registry.record.all(since), clock=registry.clock())

    def hear(self, changes: Iterable[ManagedChange]) -> None:
        """Take over what was done elsewhere; what is new here is done.

        When it returns, names stand for what they stand for there, and no answer of before holds:
        no request that comes later gets what was replaced or taken back. The rest is done beside
        all other work, whatever becomes of who told it; what cannot be had is told in the log.
        """
        taken = self._adapters.registry.take(changes)
        self._adapters.unpin_over(taken)
        for each in taken.news:
            if each.kind is ManagedKind.NAME:
                self._take_name(each)
            if each.kind is ManagedKind.UNLOAD:
                self._unload(each, taken)
            if each.kind is not ManagedKind.UNPIN:
                self._adapters.expire(each.ref, each.stamp.at)
        if any(each.kind in (ManagedKind.PIN, ManagedKind.LOAD) for each in taken.news):
            self._start(self._bring(taken.news))

    def _unload(self, change: ManagedChange, taken: Taken) -> None:
        """Begin to let go of what was unloaded, unless a later call wants it."""
        self._adapters.drop_name(change)
        if self._adapters.registry.record.is_wanted(change.ref):
            return
        # What was loaded here by hand before goes whenever its source was asked.
        was_held = any(each.ref == change.ref for each in taken.over)
        at = time.time() if was_held else change.stamp.at
        # Until the requests are done that use it.
        self._start(self._let_go(change, self._adapters.unload_elsewhere(change.ref, at)))

    async def save(self) -> None:
        """Return when what was taken over is remembered beyond this process."""
        await self._adapters.registry.save()

    def _take_name(self, change: ManagedChange) -> None:
        """Let a name stand for what it stands for elsewhere; what is younger here stays."""
        known, target = self._aliases.find(change.ref.id), change.target
        if target is None or (known is not None and known.stamp >= change.stamp):
            return
        if known is not None and known.target.refs == (target,):
            # The same elsewhere, a moment later; the token is here alone.
            self._aliases.put(replace(known, stamp=change.stamp))
            return
        selection = AdapterSelection(refs=(target,))
        alias = Alias(name=change.ref.id, target=selection, stamp=change.stamp)
        put_name(self._aliases, alias, is_private=change.is_private)

    async def close(self) -> None:
        """Do nothing more of it."""
        following = [*self._following]
        for task in following:
            task.cancel()
        await asyncio.gather(*following, return_exceptions=True)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._following.add(task)
        task.add_done_callback(self._following.discard)

    async def _let_go(self, change: ManagedChange, work: Awaitable[None]) -> None:
        try:
            await work
        except LoraxError as error:
            logger.warning("adapter %s was unloaded elsewhere, and stays: %s", change.ref, error)

    async def _bring(self, news: Iterable[ManagedChange]) -> None:
        """Pin and load what is pinned and loaded elsewhere, one after the other."""
        holds = self._adapters.registry.record.holds
        pins = [each for each in news if each.kind is ManagedKind.PIN]
        pinned = {each.ref for each in pins}
        loads = [each for each in news if each.kind is ManagedKind.LOAD and each.ref not in pinned]
        for each in (*pins, *loads):
            # It may have been taken back before its turn, or while it was loaded.
            if not holds(*each.key):
                continue
            if each.kind is ManagedKind.PIN:
                await pin_again(self._adapters, Pin(each.ref, each.tenant, each.is_private))
            else:
                await load_again(self._adapters, each.ref, OPERATOR, pin=False)
            await self._let_go(each, self._adapters.undo_late(each))


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
        put = replace(checked, stamp=alias.stamp)
        aliases.put(put)
    except ValidationError as error:
        logger.warning("the name %s is given up: %s", alias.name, error)
        return None
    return put


async def pin_again(adapters: AdapterManager, pin: Pin) -> None:
    """Pin an adapter for whoever had it pinned; a tenant's with no token, since its own is not kept."""
    if pin.tenant and pin.is_private:
        logger.warning("private adapter %s is not pinned again: its token is not kept", pin.ref)
        return
    caller = Caller(tenant=pin.tenant, is_admin=True)
    await load_again(adapters, pin.ref, caller, pin=True)


async def load_again(
    adapters: AdapterManager, ref: AdapterRef, caller: Caller, *, pin: bool
) -> None:
    """Load an adapter that was loaded before; what is wrong with it is told in the log."""
    # The server's own is for the operator alone.
    is_own = not caller.tenant and ref.source in TOKEN_SOURCES
    selection = AdapterSelection(refs=(ref,), token=hub_token() if is_own else None)
    try:
        await adapters.load(selection, caller, pin=pin, remember=False)
    except Exception as error:  # noqa: BLE001 - whatever it is, the server serves without it
        logger.warning("adapter %s, which was loaded before, is not there: %s", ref, error)
