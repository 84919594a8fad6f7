"""A router's memory plan as a table for people: a line for each purpose, a column for each rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Columns between the purpose and the first number, and between numbers.
_GAP = 2


def memory_table(memory: Any) -> list[str]:
    """Return the lines for ``{"fullest_rank": .., "ranks": [{name: bytes}, ..]}``.

    Ranks whose numbers read alike share a column. What is no such plan gives no lines.
    """
    ranks = memory.get("ranks") if isinstance(memory, Mapping) else None
    if not isinstance(ranks, list) or not all(isinstance(each, Mapping) for each in ranks):
        return []
    names = list(dict.fromkeys(str(name) for rank in ranks for name in rank))
    columns: dict[tuple[str, ...], list[int]] = {}
    for number, rank in enumerate(ranks):
        texts = tuple(_amount(rank.get(name)) for name in names)
        columns.setdefault(texts, []).append(number)
    heads = [_head(numbers, len(ranks), memory.get("fullest_rank")) for numbers in columns.values()]
    table = [(name.replace("_", " "), *row) for name, *row in zip(names, *columns, strict=True)]
    if len(ranks) > 1:
        table.insert(0, ("", *heads))
    return _aligned(table)


def _head(numbers: list[int], num_ranks: int, fullest: object) -> str:
    if len(numbers) == num_ranks:
        return f"each of {num_ranks} ranks"
    name = f"rank{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"
    return f"{name} (fullest)" if fullest in numbers else name


def _amount(count: object) -> str:
    if not isinstance(count, int):
        return "-"
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _aligned(table: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for name, *texts in table:
        cells = [text.rjust(width) for text, width in zip(texts, widths[1:], strict=True)]
        lines.append((" " * _GAP).join([name.ljust(widths[0]), *cells]).rstrip())
    return lines
