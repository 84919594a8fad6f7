"""The adapters in effect: which handle computes in which slot, with which vocabulary."""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from lorax_contract.errors import LoraxError, ValidationError
from lorax_contract.step import AdapterHandle
from lorax_shard.engine.detokenizer import TokenReader
from lorax_shard.model.interface import AdapterSlots
from lorax_shard.vocabulary import Vocabulary

if TYPE_CHECKING:
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
    # Whether its prompts are tokenized by a tokenizer of its own.
    has_own_tokens: bool = False
    # Reads the tokens of its own tokenizer; None: they are the base's, or another rank reads them.
    reader: TokenReader | None = None
    # Those tokens.
    vocabulary: Vocabulary | None = None
    # The tokens that invoke it; empty: it acts on every token.
    invocation_ids: tuple[int, ...] = ()
    # The kind of the classification head that it brings; "": none.
    head: str = ""


class ActiveAdapters:
    """Fills the model's slots and empties them; called by the thread that computes steps.

    Args:
        lane: where prepared adapters lie.
        slots: the model's.
        vocab_size, eos_token_ids: the base's.
        read_tokens: how tokens of an adapter's own are read; None: another rank does.
    """

    def __init__(
        self,
        lane: ReadyAdapters,
        slots: AdapterSlots,
        *,
        vocab_size: int,
        eos_token_ids: frozenset[int],
        read_tokens: Callable[[Vocabulary], TokenReader] | None = None,
    ) -> None:
        self._read_tokens = read_tokens
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
        active = self._described(handle, slot, ready)
        self._slots.load(slot, ready.prepared)
        self._active[handle] = active

    def _described(self, handle: AdapterHandle, slot: int, ready: ReadyAdapter) -> ActiveAdapter:
        vocab_size, ends = ready.vocab_size or self._vocab_size, self._eos_token_ids
        own = ready.vocabulary
        if own is None:
            return ActiveAdapter(
                handle, slot, vocab_size, ends, invocation_ids=ready.invocation_ids, head=ready.head
            )
        ends |= frozenset(own.end_ids.tolist())
        reader = None if self._read_tokens is None else self._read_tokens(own)
        return ActiveAdapter(
            handle, slot, vocab_size, ends, True, reader, own, ready.invocation_ids, ready.head
        )

    def deactivate(self, handle: AdapterHandle) -> None:
        """Let an adapter cease; one that is not in effect is no error."""
        active = self._active.get(handle)
        if active is not None:
            self._slots.unload(active.slot)
            del self._active[handle]

    def clear(self) -> None:
        """Let all cease; no row uses one."""
        for handle in list(self._active):
            self.deactivate(handle)


def _words(error: Exception) -> str:
    if isinstance(error, LoraxError):
        return str(error)
    return f"it could not take effect ({type(error).__name__}: {error})"
