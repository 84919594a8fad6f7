"""Copies of a step are put together as far as their order allows."""

from __future__ import annotations

import random

import pytest
from tests.helpers.toy_paged_model import expected_tokens, make_engine, make_plan, new_row

from lorax_contract.errors import ShardError
from lorax_contract.step import BlockCopy, BlockSpace, NewRow
from lorax_shard.engine.copies import CopyRun, check_copies, copy_runs

DEVICE, HOST = BlockSpace.DEVICE, BlockSpace.HOST
PROMPT = [3, 4, 5, 6, 7, 8, 9]


def apply_one(memory: dict[int, list[int]], copy: BlockCopy) -> None:
    """Make one copy."""
    value = memory[copy.source_space][copy.source_block]
    memory[copy.destination_space][copy.destination_block] = value


def apply_run(memory: dict[int, list[int]], run: CopyRun) -> None:
    """Make copies as if all were read before any is written, in any order."""
    read = [memory[run.source_space][block] for block in run.sources]
    pairs = list(zip(run.destinations, read, strict=True))
    for block, value in reversed(pairs):
        memory[run.destination_space][block] = value


def test_runs_have_the_effect_of_one_copy_after_the_other() -> None:
    rng = random.Random(0)
    num_runs = num_copies = 0
    for _ in range(300):
        copies = [
            BlockCopy(*spaces[:1], rng.randrange(5), *spaces[1:], rng.randrange(5))
            for spaces in rng.choices([(DEVICE, HOST), (HOST, DEVICE), (DEVICE, DEVICE)], k=12)
        ]
        copies.sort(key=lambda copy: (copy.source_space, rng.random() < 0.2))
        one = {DEVICE: list(range(5)), HOST: list(range(10, 15))}
        runs = {space: list(blocks) for space, blocks in one.items()}
        for copy in copies:
            apply_one(one, copy)
        for run in copy_runs(copies):
            apply_run(runs, run)
            num_runs += 1
        num_copies += len(copies)
        assert runs == one
    assert num_runs < num_copies


def test_what_goes_one_way_is_one_run() -> None:
    out = [BlockCopy(DEVICE, n, HOST, n) for n in range(4)]
    back = [BlockCopy(HOST, n, DEVICE, n + 8) for n in range(4)]
    assert len(list(copy_runs([*out, *back]))) == 2


@pytest.mark.parametrize(
    ("copy", "text"),
    [
        (BlockCopy(DEVICE, 8, HOST, 0), "outside the pool of 8"),
        (BlockCopy(HOST, 2, DEVICE, 0), "outside host memory of 2"),
        (BlockCopy(HOST, 0, HOST, 1), "not copied within host memory"),
    ],
)
def test_copies_outside_their_space_are_refused(copy: BlockCopy, text: str) -> None:
    with pytest.raises(ShardError, match=text):
        check_copies(1, [copy], 8, 2)


def test_a_row_goes_on_from_host_memory_with_no_token_computed_again() -> None:
    """Its blocks are granted to another row in the very step in which they leave."""
    engine = make_engine(num_host_blocks=4)
    engine.step(make_plan(1, [(1, 7, [1, 2])], new=[new_row(1, PROMPT)]))
    first = expected_tokens(PROMPT, 6)
    other = [9, 8, 7, 6, 5]
    leaves = make_plan(2, [(2, 5, [1, 2])], new=[new_row(2, other)], drop=[1])
    leaves.copies = [BlockCopy(DEVICE, 1, HOST, 3), BlockCopy(DEVICE, 2, HOST, 0)]
    assert engine.step(leaves).tokens.ids == expected_tokens(other, 1)
    row = new_row(1, PROMPT)
    back = NewRow(row.spec, first[:1], num_cached=7)
    comes = make_plan(3, [(1, 1, [5, 6])], new=[back], drop=[2])
    comes.copies = [BlockCopy(HOST, 3, DEVICE, 5), BlockCopy(HOST, 0, DEVICE, 6)]
    engine.model.passes.clear()
    assert engine.step(comes).tokens.ids == first[1:2]
    assert engine.model.passes == [[1]]
    ids = []
    for number in range(4):
        blocks = [7] if number == 0 else []
        ids += engine.step(make_plan(4 + number, [(1, 1, blocks)])).tokens.ids
    assert ids == first[2:]
