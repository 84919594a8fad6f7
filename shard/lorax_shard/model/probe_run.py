"""Computes whole rows through a paged model, for the load-time probe."""

from __future__ import annotations

import itertools

import torch

from lorax_shard.attention.kv_cache import num_blocks_for
from lorax_shard.model.interface import PagedModel

# How many tokens a row takes in its successive steps; rows start at different places.
_CHUNKS = (3, 1, 14, 1, 1, 6, 25)


def run_ragged(model: PagedModel, rows: list[torch.Tensor], block_size: int) -> list[torch.Tensor]:
    """Compute all rows in one step; returns the len x vocab logits of each."""
    return _run(model, rows, block_size, [[len(row)] for row in rows])


def run_chunked(model: PagedModel, rows: list[torch.Tensor], block_size: int) -> list[torch.Tensor]:
    """Compute the rows side by side in chunks of uneven size, single tokens among them."""
    pieces = []
    for index, row in enumerate(rows):
        sizes, left = [], len(row)
        for size in itertools.islice(itertools.cycle(_CHUNKS), index, None):
            if left == 0:
                break
            sizes.append(min(size, left))
            left -= sizes[-1]
        pieces.append(sizes)
    return _run(model, rows, block_size, pieces)


def _run(
    model: PagedModel, rows: list[torch.Tensor], block_size: int, pieces: list[list[int]]
) -> list[torch.Tensor]:
    """Step s computes piece s of every row that still has one."""
    needed = [num_blocks_for(len(row), block_size) for row in rows]
    # Block numbers run backwards, so that a table mistaken for a range shows.
    numbers = iter(range(sum(needed) - 1, -1, -1))
    tables = torch.zeros(len(rows), max(needed), dtype=torch.long)
    for index, count in enumerate(needed):
        tables[index, :count] = torch.tensor([next(numbers) for _ in range(count)])
    model.allocate_cache(sum(needed), block_size)
    done = [0] * len(rows)
    logits: list[list[torch.Tensor]] = [[] for _ in rows]
    for step in range(max(len(sizes) for sizes in pieces)):
        counts = {index: sizes[step] for index, sizes in enumerate(pieces) if step < len(sizes)}
        _step(model, rows, tables, block_size, counts, done, logits)
    model.free_cache()
    return [torch.cat(parts) for parts in logits]


def _step(
    model: PagedModel,
    rows: list[torch.Tensor],
    tables: torch.Tensor,
    block_size: int,
    counts: dict[int, int],
    done: list[int],
    logits: list[list[torch.Tensor]],
) -> None:
    order = sorted(counts, key=lambda index: counts[index] > 1)
    spans = [torch.arange(done[index], done[index] + counts[index]) for index in order]
    slots = [
        tables[index, span // block_size] * block_size + span % block_size
        for index, span in zip(order, spans, strict=True)
    ]
    for index in order:
        done[index] += counts[index]
    metadata = model.make_metadata(
        query_lens=[counts[index] for index in order],
        context_lens=[done[index] for index in order],
        slots=torch.cat(slots).to(model.device),
        block_tables=tables[order].to(model.device),
        num_decode_rows=sum(counts[index] == 1 for index in order),
    )
    ids = torch.cat([rows[index][done[index] - counts[index] : done[index]] for index in order])
    positions = torch.cat(spans).to(model.device)
    everything = torch.arange(len(ids), device=model.device)
    computed = model.forward(ids, positions, metadata, everything)
    for index, part in zip(order, torch.split(computed, [counts[i] for i in order]), strict=True):
        logits[index].append(part)
