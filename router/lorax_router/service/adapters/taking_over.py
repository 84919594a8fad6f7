"""Takes over what was managed by hand at another server, or here before this one began."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import replace
from typing import Any

from lorax_contract.adapters import TOKEN_SOURCES, AdapterRef
from lorax_contract.errors import LoraxError, ValidationError
from lorax_contract.hub import hub_token
from lorax_router.service.adapters.aliases import Alias, AliasBook
from lorax_router.service.adapters.catalog import AdapterSelection
from lorax_router.service.adapters.managed import ManagedChange, ManagedKind
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

    async def known(self) -> list[ManagedChange]:
        """Return the last that was done about everything."""
        return await self._adapters.registry.changes()

    def hear(self, changes: Iterable[ManagedChange]) -> None:
        """Let names stand for what they stand for elsewhere, and no answer of before hold.

        Done when it returns: no request that comes later gets what was replaced or taken back.
        """
        for each in changes:
            if each.kind is ManagedKind.NAME:
                self._take_name(each)
            if each.holds or each.kind is not ManagedKind.PIN:
                self._adapters.expire(each.ref, each.at)

    def _take_name(self, change: ManagedChange) -> None:
        """Take over a name, or its end; what is younger here stays."""
        known, target = self._aliases.find(change.ref.id), change.target
        if known is not None and known.created_at >= change.at:
            return
        if change.holds and known is not None and known.target.refs == (target,):
            # The same elsewhere, a moment later; the token is here alone.
            self._aliases.put(replace(known, created_at=change.at))
        elif change.holds and target is not None:
            alias = Alias(
                name=change.ref.id, target=AdapterSelection(refs=(target,)), created_at=change.at
            )
            put_name(self._aliases, alias, is_private=change.is_private)
        elif known is not None:
            self._aliases.drop(known.name)

    async def take(self, changes: Sequence[ManagedChange]) -> None:
        """Remember what was done elsewhere; what is new here is done, beside all other work.

        It goes on when the caller leaves. What cannot be had is told in the log.
        """
        await asyncio.shield(self._start(self._take(changes)))

    async def close(self) -> None:
        """Do nothing more of it."""
        following = [*self._following]
        for task in following:
            task.cancel()
        await asyncio.gather(*following, return_exceptions=True)

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._following.add(task)
        task.add_done_callback(self._following.discard)
        return task

    async def _take(self, changes: Sequence[ManagedChange]) -> None:
        news = await self._adapters.registry.take(changes)
        for each in news:
            if not each.holds and each.kind is ManagedKind.PIN:
                self._adapters.unpin_elsewhere(each.ref, each.tenant)
            elif not each.holds and each.kind is ManagedKind.LOAD:
                # Until the requests are done that use it.
                self._start(self._unload(each))
        if any(each.holds for each in news):
            self._start(self._bring(news))

    async def _unload(self, change: ManagedChange) -> None:
        try:
            await self._adapters.unload_elsewhere(change.ref, change.at)
        except LoraxError as error:
            logger.warning("adapter %s was unloaded elsewhere, and stays: %s", change.ref, error)

    async def _bring(self, news: Iterable[ManagedChange]) -> None:
        """Pin and load what is pinned and loaded elsewhere, one after the other."""
        pins = [each for each in news if each.holds and each.kind is ManagedKind.PIN]
        pinned = {each.ref for each in pins}
        loads = [
            each for each in news
            if each.holds and each.kind is ManagedKind.LOAD and each.ref not in pinned
        ]  # fmt: skip
        holds = self._adapters.registry.holds
        for each in pins:
            # It may have been taken back before its turn, or while it was loaded.
            if await holds(each):
                await pin_again(self._adapters, Pin(each.ref, each.tenant, each.is_private))
                if not await holds(each):
                    self._adapters.unpin_elsewhere(each.ref, each.tenant)
        for each in loads:
            if await holds(each):
                await load_again(self._adapters, each.ref, OPERATOR, pin=False)


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
