"""The memory plan on a terminal, and in a log collector's JSON."""

from __future__ import annotations

import io
import json

import pytest

from lorax_launcher.console import Console
from lorax_launcher.memory_table import memory_table

MIB, GIB = 2**20, 2**30


def rank(cache: int, spare: int = 3 * MIB) -> dict[str, int]:
    return {"weights": 15 * GIB, "kv_cache": cache, "unused": spare}


def test_one_rank_needs_no_heading() -> None:
    assert memory_table({"fullest_rank": 0, "ranks": [rank(512 * MIB)]}) == [
        "weights   15.00 GiB",
        "kv cache  512.0 MiB",
        "unused      3.0 MiB",
    ]


def test_ranks_that_are_alike_share_a_column() -> None:
    (head, *_) = memory_table({"fullest_rank": 1, "ranks": [rank(GIB), rank(GIB + 7)]})
    assert head.split() == ["each", "of", "2", "ranks"]


def test_ranks_that_differ_stand_side_by_side() -> None:
    spares = (5 * GIB, 3 * MIB, 5 * GIB)
    lines = memory_table({"fullest_rank": 1, "ranks": [rank(GIB, spare) for spare in spares]})
    assert lines[0].split("  ")[-2:] == ["ranks 0, 2", "rank 1 (fullest)"]
    assert lines[-1].split() == ["unused", "5.00", "GiB", "3.0", "MiB"]
    assert len({len(line) for line in lines}) == 1


@pytest.mark.parametrize("plan", [None, 3, {}, {"ranks": 3}, {"ranks": [1]}, {"ranks": []}])
def test_what_is_no_plan_is_no_table(plan: object) -> None:
    assert memory_table(plan) == []


def shown(record: dict[str, object], *, json_output: bool) -> str:
    stream = io.StringIO()
    Console(stream, json_output=json_output).child_line("router", json.dumps(record))
    return stream.getvalue()


def test_the_console_shows_the_table_below_its_line_and_json_as_one_record() -> None:
    record = {
        "ts": 0.5, "level": "info", "logger": "x", "message": "memory of cpu",
        "event": "memory_plan",
        "memory": {"fullest_rank": 0, "ranks": [{**rank(GIB), "\x1b[2J": 1}]},
    }  # fmt: skip
    lines = shown(record, json_output=False).splitlines()
    assert lines[0].endswith("memory of cpu")
    assert lines[1].split() == ["weights", "15.00", "GiB"]
    assert len(lines) == 5
    assert "\x1b" not in "".join(lines)
    (line,) = shown(record, json_output=True).splitlines()
    assert json.loads(line)["memory"] == record["memory"]
