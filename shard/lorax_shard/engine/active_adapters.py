"""The adapters in effect: which handle computes in which slot, with which vocabulary."""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from lorax_contract.errors import LoraxError, ValidationError
from lorax_contract.step import AdapterHandle
from lorax_shard.engine.outcome import TokenTexts
from lorax_shard.model.interface import AdapterSlots

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from lorax_shard.adapters.prepare_lane import ReadyAdapter

logger = logging.getLogger(__name__)


class ReadyAdapters(Protocol):
    """Where prepared adapters lie."""

    def ready(self, handle: AdapterHandle) -> ReadyAdapter | None:
        """Return a prepared adapter; None if there is none under this handle."""


@dataclass(frozen=True, slots=True)
class ActiveAdapter:
    """An adapter in effect."""

    handle: AdapterHandle
    slot: int
    vocab_size: int
    eos_token_ids: frozenset[int]
    # The adapter's own; None: the base's.
    tokenizer: Tokenizer | None = None
    texts: TokenTexts | None = None


class ActiveAdapters:
    """Fills the model's slots and empties them; called by the thread that computes steps."""

    def __init__(
        self,
        lane: ReadyAdapters,
        slots: AdapterSlots,
        *,
        vocab_size: int,
        eos_token_ids: frozenset[int],
    ) -> None:
        self._lane = lane
        self._slots = slots
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._active: dict[AdapterHandle, ActiveAdapter] = {}
        # Of the last change: what did not take effect, and why.
        self._inactive: dict[AdapterHandle, str] = {}

    def __contains__(self, handle: object) -> bool:
        return handle in self._active

    def __getitem__(self, handle: AdapterHandle) -> ActiveAdapter:
        """Return an adapter in effect; ValidationError if it is not."""
        try:
            return self._active[handle]
        except KeyError:
            why = self._inactive.get(handle)
            raise ValidationError(
                f"adapter handle {handle} is not in effect in this shard; "
                + (why or "prepare and activate it before the request is sent")
            ) from None

    def change(
        self,
        activate: Sequence[AdapterHandle],
        missing: Callable[[Container[AdapterHandle]], Mapping[AdapterHandle, str]] | None = None,
    ) -> dict[AdapterHandle, str]:
        """Let prepared adapters take effect; return those that do not, and why.

        ``missing`` says of which others' ranks lack one: it then takes effect here neither.
        """
        self._inactive = {}
        for handle in activate:
            try:
                self.activate(handle)
            except Exception as error:  # its rows are refused, one by one and in words
                logger.exception("adapter %d did not take effect", handle)
                self._inactive[handle] = _words(error)
        if missing is not None:
            for handle, text in missing(self).items():
                self._inactive.setdefault(handle, text)
                self.deactivate(handle)
        return dict(self._inactive)

    def activate(self, handle: AdapterHandle) -> None:
        """Let a prepared adapter take effect; ValidationError if it is not prepared.

        What fails changes nothing.
        """
        if handle in self._active:
            return
        ready = self._lane.ready(handle)
        if ready is None:
            raise ValidationError(f"adapter handle {handle} is not prepared in this shard")
        taken = self._slots.slots
        slot = next(number for number in range(len(taken) + 1) if number not in taken)
        self._slots.load(slot, ready.prepared)
        own = ready.tokenizer
        self._active[handle] = ActiveAdapter(
            handle,
            slot,
            ready.vocab_size or self._vocab_size,
            self._eos_token_ids | ready.eos_token_ids,
            own,
            None if own is None else TokenTexts(own),
        )

    def deactivate(self, handle: AdapterHandle) -> None:
        """Let an adapter cease; one that is not in effect is no error."""
        active = self._active.get(handle)
        if active is not None:
            self._slots.unload(active.slot)
            del self._active[handle]


def _words(error: Exception) -> str:
    if isinstance(error, LoraxError):
        return str(error)
    return f"it could not take effect ({type(error).__name__}: {error})"
