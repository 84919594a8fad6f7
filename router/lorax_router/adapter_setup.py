"""The adapters that a router begins with: those of its configuration, and those it remembers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable

from lorax_contract.adapters import TOKEN_SOURCES, AdapterRef, AdapterUnavailableError
from lorax_contract.config import RouterConfig
from lorax_contract.errors import (
    LoraxError,
    ShardError,
    StartupError,
    UnhealthyError,
    ValidationError,
)
from lorax_contract.exit_codes import ExitCode
from lorax_contract.hub import hub_token
from lorax_router.service.adapters.aliases import AliasBook
from lorax_router.service.adapters.catalog import AdapterSelection
from lorax_router.service.adapters.managed import ManagedKind
from lorax_router.service.adapters.management import AdapterManager
from lorax_router.service.adapters.registry import AdapterRegistry
from lorax_router.service.adapters.selection import SelectionPolicy
from lorax_router.service.adapters.taking_over import load_again, pin_again, put_name
from lorax_router.service.callers import OPERATOR
from lorax_router.service.requests import BASE_MODEL_ADAPTER_ID

logger = logging.getLogger(__name__)


def alias_book(config: RouterConfig) -> AliasBook:
    """Return the names of the operator's choosing; raises StartupError for what can be none."""
    bases = (*config.served_model_names, config.model_id, BASE_MODEL_ADAPTER_ID)
    aliases = AliasBook(reserved=bases)
    for text in config.adapter_aliases:
        name, _, target = text.partition("=")
        try:
            ref = AdapterRef.parse(target, config.default_adapter_source)
            token = hub_token() if ref.source in TOKEN_SOURCES else None
            aliases.put(aliases.make(name, AdapterSelection(refs=(ref,), token=token)))
        except (AdapterUnavailableError, ValidationError) as error:
            raise StartupError(f"adapter {name}: {error}", ExitCode.USAGE) from error
    return aliases


def adapters_to_preload(
    config: RouterConfig, selections: SelectionPolicy
) -> tuple[AdapterSelection, ...]:
    """Return the adapters that are to be there before the first request."""
    source = config.preloaded_adapter_source
    wanted = [own_selection(source, name) for name in config.preloaded_adapter_ids]
    wanted += [alias.selection for alias in selections.aliases]
    return tuple(wanted if selections.static is None else [selections.static, *wanted])


def own_selection(source: str, name: str) -> AdapterSelection:
    """An adapter that the server itself wants, with the server's own token."""
    try:
        return AdapterSelection(refs=(AdapterRef.of(source, name),), token=hub_token())
    except AdapterUnavailableError as error:
        raise StartupError(error.text, ExitCode.USAGE) from error


async def preload(adapters: AdapterManager, wanted: Iterable[AdapterSelection]) -> None:
    """Load the adapters that are to be there before the first request; raises StartupError."""
    try:
        async with asyncio.TaskGroup() as group:
            for selection in dict.fromkeys(wanted):
                group.create_task(_preload(adapters, selection))
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None


async def _preload(adapters: AdapterManager, selection: AdapterSelection) -> None:
    try:
        await adapters.load(selection, pin=True, remember=False)
    except (ShardError, UnhealthyError) as error:
        raise StartupError(f"a shard is gone: {error}", ExitCode.SHARD_UNREACHABLE) from error
    except LoraxError as error:
        raise StartupError(
            f"adapter {selection.label} cannot be loaded: {error}", ExitCode.ADAPTER_UNUSABLE
        ) from error
    logger.info("adapter %s is loaded and stays", selection.label)


def restore_names(registry: AdapterRegistry, aliases: AliasBook) -> None:
    """Let names stand again for what they stood for; those of the configuration go before them."""
    remembered = registry.read()
    for alias in remembered.names:
        if aliases.find(alias.name) is not None:
            continue
        put_name(aliases, alias, is_private=alias.name in remembered.private_names)


async def bring_back(adapters: AdapterManager) -> None:
    """Load what was pinned or loaded by hand, one after the other; what cannot be had is told."""
    remembered, holds = adapters.registry.read(), adapters.registry.record.holds
    for pin in remembered.pins:
        # Who keeps it may have let it go meanwhile.
        if holds(ManagedKind.PIN, pin.ref, pin.tenant):
            await pin_again(adapters, pin)
    pinned = {pin.ref for pin in remembered.pins}
    for ref in remembered.loads:
        if ref not in pinned and holds(ManagedKind.LOAD, ref):
            await load_again(adapters, ref, OPERATOR, pin=False)
