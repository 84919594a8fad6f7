"""Who draws the tokens: the only rank, or rank 0 for all.

The logits of several ranks are equal up to rounding, and a draw can fall either way: what
rank 0 drew is what all go on with, so that ranks never part.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch

from lorax_shard.engine.forward import sample
from lorax_shard.engine.rows import Row
from lorax_shard.engine.sampler import SampledTokens, Sampler
from lorax_shard.parallel.group import RankGroup

# Columns before the alternatives: id, logprob, how many alternatives (-1: none asked for).
_FIRST = 3


class RankSampler:
    """Draws the next token of each row, the same one on all ranks."""

    def __init__(self, sampler: Sampler, group: RankGroup | None = None) -> None:
        self.sampler = sampler
        self._group = group

    def choose(self, logits: torch.Tensor, rows: list[Row]) -> SampledTokens:
        """Return the next tokens; ``logits`` is S x V float32."""
        group = self._group
        if group is None:
            return sample(self.sampler, logits, rows)
        drawn = sample(self.sampler, logits, rows) if group.rank == 0 else None
        most = max(row.params.num_alternatives for row in rows)
        table = torch.zeros(len(rows), _FIRST + 2 * most, dtype=torch.float64)
        if drawn is not None:
            _write(drawn, table)
        result = _read(group.broadcast(table))
        if -1 in result.ids:
            texts = [] if drawn is None else [drawn.errors.get(i, "") for i in range(len(rows))]
            texts = share_texts(group, texts)
            result.errors = {i: text for i, text in enumerate(texts) if text}
        return result


def share_texts(group: RankGroup, texts: Sequence[str]) -> list[str]:
    """Return rank 0's texts on all ranks."""
    data = json.dumps(list(texts)).encode()
    (size,) = group.broadcast(torch.tensor([len(data)])).tolist()
    own = torch.zeros(size, dtype=torch.uint8)
    if group.rank == 0:
        own = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    shared: list[str] = json.loads(bytes(group.broadcast(own).tolist()))
    return shared


def _write(drawn: SampledTokens, table: torch.Tensor) -> None:
    """Put tokens into a table of numbers; float64 holds ids and logprobs exactly."""
    most = (table.shape[1] - _FIRST) // 2
    table[:, 0] = torch.tensor(drawn.ids, dtype=table.dtype)
    table[:, 1] = torch.tensor(drawn.logprobs, dtype=table.dtype)
    table[:, 2] = -1
    for line, alternatives in zip(table, drawn.alternatives, strict=True):
        if alternatives is not None:
            ids, logprobs = (torch.tensor(each, dtype=table.dtype) for each in alternatives)
            line[2] = len(ids)
            line[_FIRST : _FIRST + len(ids)] = ids
            line[_FIRST + most : _FIRST + most + len(ids)] = logprobs


def _read(table: torch.Tensor) -> SampledTokens:
    most = (table.shape[1] - _FIRST) // 2
    result = SampledTokens([], [], [])
    for token_id, logprob, count, *rest in table.tolist():
        result.ids.append(int(token_id))
        result.logprobs.append(logprob)
        number = int(count)
        ids = [int(each) for each in rest[: max(0, number)]]
        logprobs = rest[most : most + max(0, number)]
        result.alternatives.append(None if number < 0 else (ids, logprobs))
    return result
