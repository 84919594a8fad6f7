"""Drives a paged model row by row of a schedule, and compares its logits with transformers'.

The runner keeps its own block tables and can plant the faults that the
comparison must find.
"""

from __future__ import annotations

from enum import Enum, auto
from pathlib import Path

import torch

from lorax_shard.model.interface import PagedModel

RELATIVE_TOLERANCE = 1e-4


class Fault(Enum):
    """Something a paged server could get wrong."""

    NONE = auto()
    LOST_BLOCK = auto()  # a row's second block is another one than its KV was written to
    POSITION_OFF_BY_ONE = auto()  # tokens after a row's first step sit one position too far
    WINDOW_IGNORED = auto()  # attention sees everything
    CHUNK_IGNORED = auto()
    SINKS_IGNORED = auto()
    SOFTCAP_IGNORED = auto()


class LogitsDifferError(AssertionError):
    """The paged model computed other logits than the reference."""


class PagedRunner:
    """Rows of token ids over one pool of blocks, handed out in a shuffled order."""

    def __init__(
        self,
        model: PagedModel,
        rows: list[list[int]],
        *,
        num_blocks: int,
        block_size: int = 4,
        fault: Fault = Fault.NONE,
    ) -> None:
        self.model = model
        self.rows = rows
        self.done = [0] * len(rows)
        self.logits: list[dict[int, torch.Tensor]] = [{} for _ in rows]
        self._block_size = block_size
        self._fault = fault
        self._tables: list[list[int]] = [[] for _ in rows]
        order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(7))
        self._free: list[int] = order.tolist()
        model.allocate_cache(num_blocks, block_size)

    def step(self, counts: dict[int, int]) -> None:
        """Compute the next ``counts[row]`` tokens of each row, all in one forward pass."""
        order = sorted(counts, key=lambda row: counts[row] > 1)
        spans = [range(self.done[row], self.done[row] + counts[row]) for row in order]
        slots = [self._slot(row, at) for row, span in zip(order, spans) for at in span]
        positions = [
            at + (self._fault is Fault.POSITION_OFF_BY_ONE and span.start > 0)
            for span in spans
            for at in span
        ]
        metadata = self.model.make_metadata(
            query_lens=[counts[row] for row in order],
            context_lens=[span.stop for span in spans],
            slots=torch.tensor(slots),
            block_tables=self._block_tables(order),
            num_decode_rows=sum(counts[row] == 1 for row in order),
        )
        if self._fault in _IGNORED:
            metadata.backend = _without(_IGNORED[self._fault], metadata.backend)
        ids = [self.rows[row][at] for row, span in zip(order, spans) for at in span]
        logits = self.model.forward(
            torch.tensor(ids),
            torch.tensor(positions),
            metadata,
            torch.arange(len(ids)),
            self.slots(order),
        )
        computed = iter(logits)
        for row, span in zip(order, spans):
            self.logits[row].update({at: next(computed) for at in span})
            self.done[row] = span.stop

    def slots(self, order: list[int]) -> list[int | None]:
        """Return the adapters' slots of rows; here all compute the base model."""
        return [None] * len(order)

    def preempt(self, row: int) -> None:
        """Drop a row's KV; its blocks go to whoever asks next."""
        self._free = self._tables[row] + self._free
        self._tables[row] = []
        self.done[row] = 0

    def _slot(self, row: int, position: int) -> int:
        table = self._tables[row]
        if position // self._block_size == len(table):
            table.append(self._free.pop(0))
        return table[position // self._block_size] * self._block_size + position % self._block_size

    def _block_tables(self, order: list[int]) -> torch.Tensor:
        tables = [list(self._tables[row]) for row in order]
        if self._fault is Fault.LOST_BLOCK:
            for table in tables:
                table[1:2] = [self._free[-1]] * len(table[1:2])
        widest = max(map(len, tables))
        return torch.tensor([table + [0] * (widest - len(table)) for table in tables])


def check_logits(runner: PagedRunner, stock: list[torch.Tensor]) -> float:
    """Raise LogitsDifferError unless every token has the reference's logits within 1e-4 relative.

    Returns the largest relative difference.
    """
    scale = max(float(logits.abs().max()) for logits in stock)
    largest = 0.0
    for row, expected in enumerate(stock):
        assert sorted(runner.logits[row]) == list(range(len(expected))), "not all were computed"
        for at, got in runner.logits[row].items():
            difference = float((got - expected[at]).abs().max())
            if not difference <= RELATIVE_TOLERANCE * scale:
                raise LogitsDifferError(
                    f"row {row}, token {at}: off by {difference:.3g} on a scale of {scale:.3g}"
                )
            largest = max(largest, difference / scale)
    return largest


def stock_logits(path: Path, rows: list[list[int]]) -> list[torch.Tensor]:
    """Return the len x vocab logits that transformers alone computes, one row at a time."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.inference_mode():
        return [model(torch.tensor([row]), use_cache=False).logits[0] for row in rows]


# What a faulty backend takes no notice of.
_IGNORED = {
    Fault.WINDOW_IGNORED: "window",
    Fault.CHUNK_IGNORED: "chunk",
    Fault.SINKS_IGNORED: "sinks",
    Fault.SOFTCAP_IGNORED: "softcap",
}


def _without(part, backend):
    class Without(type(backend)):
        def attend(self, query, key, value, layer, spec, metadata):
            return super().attend(query, key, value, layer, spec._replace(**{part: None}), metadata)

    return Without()
