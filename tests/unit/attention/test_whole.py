"""Attention of encoders: rows of any lengths, each over itself alone, near or all of it."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lorax_shard.attention.backend import AttentionSpec
from lorax_shard.attention.whole import WholeAttention, split_rows

HEADS, KV_HEADS, DIM = 4, 2, 8


def metadata(lens: list[int]) -> Any:
    return SimpleNamespace(
        query_lens=lens, scratch={}, slots=torch.zeros(sum(lens), dtype=torch.long)
    )


def alone(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None, scaling: float
) -> torch.Tensor:
    """Write the scores of one row out, head by head."""
    at = torch.arange(len(q))
    far = (at[:, None] - at).abs() >= (math.inf if window is None else window)
    heads = []
    for head in range(HEADS):
        of = head // (HEADS // KV_HEADS)
        scores = (scaling * q[:, head] @ k[:, of].T).masked_fill(far, -math.inf)
        heads.append(scores.softmax(dim=-1) @ v[:, of])
    return torch.stack(heads, dim=1)


@pytest.mark.parametrize("window", [None, 1, 4, 64])
@pytest.mark.parametrize("seed", range(4))
def test_each_row_sees_itself_alone(window: int | None, seed: int) -> None:
    draw = random.Random(seed)
    lens = [draw.choice([1, 2, 3, 3, 9, 17, 40, 41]) for _ in range(draw.randint(1, 20))]
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(sum(lens), num, DIM, generator=generator) for num in (HEADS, KV_HEADS, KV_HEADS)
    )
    spec = AttentionSpec(scaling=0.3, window=window)
    found = WholeAttention().attend(q, k, v, 0, spec, metadata(lens))
    rows = zip(*(torch.split(each, lens) for each in (q, k, v)), strict=True)
    wanted = torch.cat([alone(*row, window, 0.3) for row in rows])
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("seed", range(6))
def test_rows_are_split_into_few_groups_that_fill_up_little(seed: int) -> None:
    draw = random.Random(seed)
    lens = [draw.randint(1, 500) for _ in range(draw.randint(1, 60))]
    groups = split_rows(lens)
    assert sorted(row for rows in groups for row in rows) == list(range(len(lens)))
    for rows in groups:
        own = sum(lens[row] ** 2 for row in rows)
        assert len(rows) * max(lens[row] for row in rows) ** 2 <= 1.5 * own + 8192
    assert len(groups) <= 12
