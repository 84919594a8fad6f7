"""A toy model with slots, and a lane of made-up adapters: what a step does with handles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from tests.helpers.toy_paged_model import BLOCK_SIZE, ToyModel, toy_tokenizer

from lorax_contract.step import AdapterHandle, NewRow, WarmupSpec
from lorax_shard.constraints.setup import constraints_maker
from lorax_shard.engine.engine import Engine
from lorax_shard.engine.memory import PoolSettings
from lorax_shard.vocabulary import Vocabulary


@dataclass(frozen=True)
class ToyAdapter:
    """An adapter whose rows get ``bonus`` on the logit of ``favourite``."""

    favourite: int
    bonus: float = 100.0
    vocabulary: Vocabulary | None = None
    # Rows of its vocabulary where it adds tokens; 0: the base's.
    vocab_size: int = 0
    # The tokens that invoke it.
    invocation_ids: tuple[int, ...] = ()
    head: str = ""

    @property
    def prepared(self) -> ToyAdapter:
        return self


class ToyPrepared(dict[AdapterHandle, ToyAdapter]):
    """Prepared adapters by handle."""

    def ready(self, handle: AdapterHandle) -> ToyAdapter | None:
        return self.get(handle)


class ToySlots:
    """Slots that refuse what the real ones refuse."""

    def __init__(self) -> None:
        self.loaded: dict[int, ToyAdapter] = {}

    @property
    def slots(self) -> dict[int, str]:
        return {slot: f"toy {slot}" for slot in self.loaded}

    def load(self, slot: int, adapter: Any) -> None:
        assert slot not in self.loaded, "the slot holds an adapter"
        if adapter.favourite < 0:
            raise RuntimeError("this adapter cannot be loaded")
        self.loaded[slot] = adapter

    def unload(self, slot: int) -> None:
        del self.loaded[slot]


class SlottedToy(ToyModel):
    """The toy model, whose rows favour what the adapter in their slot favours."""

    lora_backend = "toy"

    def __init__(self, eos_token_ids: Sequence[int] = ()) -> None:
        super().__init__(eos_token_ids)
        self.slots = ToySlots()
        # The slots of the rows of every forward pass.
        self.row_slots: list[list[int | None]] = []
        # How many tokens each of them is for.
        self.slot_lens: list[list[int]] = []

    def forward(
        self, input_ids, positions, metadata, logit_rows, slots=(), slot_lens=None, segments=None
    ):
        self.row_slots.append(list(slots))
        self.slot_lens.append(list(slot_lens or metadata.query_lens))
        logits = super().forward(input_ids, positions, metadata, logit_rows)
        used = [None if slot is None else self.slots.loaded[slot] for slot in slots]
        wide = max([each.vocab_size for each in used if each], default=0)
        padding = (0, max(0, wide - logits.shape[1]))
        logits = torch.nn.functional.pad(logits, padding, value=float("-inf"))
        rows = torch.repeat_interleave(torch.tensor(self.slot_lens[-1]))[logit_rows]
        for scores, row in zip(logits, rows.tolist(), strict=True):
            if (adapter := used[row]) is not None:
                own = scores[self.vocab_size : adapter.vocab_size]
                own.copy_(torch.linspace(-3.0, 3.0, len(own)))
                scores[adapter.favourite] += adapter.bonus
        return logits


def make_engine(
    lane: ToyPrepared, *, eos_token_ids: Sequence[int] = ()
) -> tuple[Engine, SlottedToy]:
    """Return a warm engine with slots, and its model; outputs can be bound to grammars."""
    pool = PoolSettings(block_size=BLOCK_SIZE, memory_fraction=0.5, num_blocks=64)
    model = SlottedToy(eos_token_ids)
    engine = Engine(
        model,
        toy_tokenizer(),
        pool,
        adapters=lane,
        make_constraints=constraints_maker(toy_tokenizer(), model.vocab_size, eos_token_ids),
    )
    engine.warm_up(
        WarmupSpec(max_input_length=32, max_total_tokens=48, max_step_tokens=16, max_rows=4)
    )
    model.row_slots.clear()
    return engine, model


def using(row: NewRow, adapter: int) -> NewRow:
    """Return the row with an adapter."""
    return replace(row, spec=replace(row.spec, adapter=AdapterHandle(adapter)))
