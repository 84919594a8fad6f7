"""The adapters in effect: which handle computes in which slot, with which vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from lorax_contract.errors import ValidationError
from lorax_contract.step import AdapterHandle
from lorax_shard.engine.outcome import TokenTexts

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from lorax_shard.adapters.prepare_lane import ReadyAdapter


class ReadyAdapters(Protocol):
    """Where prepared adapters lie."""

    def ready(self, handle: AdapterHandle) -> ReadyAdapter | None:
        """Return a prepared adapter; None if there is none under this handle."""


class Slots(Protocol):
    """The model's slots; they change between steps only."""

    def load(self, slot: int, adapter: Any) -> None:
        """Put a prepared adapter into an empty slot."""

    def unload(self, slot: int) -> None:
        """Empty a slot."""


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
    """Owns the slots of one rank; called by the thread that computes steps."""

    def __init__(
        self, lane: ReadyAdapters, slots: Slots, *, vocab_size: int, eos_token_ids: frozenset[int]
    ) -> None:
        self._lane = lane
        self._slots = slots
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._active: dict[AdapterHandle, ActiveAdapter] = {}

    def __contains__(self, handle: object) -> bool:
        return handle in self._active

    def __getitem__(self, handle: AdapterHandle) -> ActiveAdapter:
        """Return an adapter in effect; ValidationError if it is not."""
        try:
            return self._active[handle]
        except KeyError:
            raise ValidationError(
                f"adapter handle {handle} is not in effect in this shard; "
                "prepare and activate it before the request is sent"
            ) from None

    def activate(self, handle: AdapterHandle) -> None:
        """Let a prepared adapter take effect; ValidationError if it is not prepared."""
        if handle in self._active:
            return
        ready = self._lane.ready(handle)
        if ready is None:
            raise ValidationError(f"adapter handle {handle} is not prepared in this shard")
        taken = {each.slot for each in self._active.values()}
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
        active = self._active.pop(handle, None)
        if active is not None:
            self._slots.unload(active.slot)
