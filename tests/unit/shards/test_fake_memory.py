"""The memory of FakeShard finds what would corrupt a real KV cache."""

from __future__ import annotations

import pytest

from lorax_contract.step import BlockCopy
from lorax_router.shards.fake.memory import FakeMemory, FakeShardError
from lorax_router.shards.fake.model import digest_of, key_of

TOKENS = [5, 6, 7, 8, 9]


def filled(table=(3, 1), block_size=4) -> FakeMemory:
    memory = FakeMemory(6, block_size)
    memory.grant(1, table)
    memory.write(1, table, 0, TOKENS)
    return memory


def test_the_digest_is_that_of_the_sequence_wherever_its_blocks_lie():
    expected = digest_of(key_of(token, i) for i, token in enumerate(TOKENS))
    assert filled((3, 1)).digest([3, 1]) == expected
    assert filled((0, 5)).digest([0, 5]) == expected
    assert filled((0, 2, 4), block_size=2).digest([0, 2, 4]) == expected


def test_chunks_make_no_difference():
    memory = FakeMemory(6, 4)
    memory.grant(1, [3, 1])
    for position, token in enumerate(TOKENS):
        memory.write(1, [3, 1], position, [token])
    assert memory.digest([3, 1]) == filled().digest([3, 1])


@pytest.mark.parametrize("table", [[3], [1], [3, 0], [3, 3], []])
def test_a_lost_or_wrong_block_changes_the_digest(table):
    memory = filled()
    assert memory.digest(table) != memory.digest([3, 1])


@pytest.mark.parametrize(
    ("request_id", "block", "complaint"),
    [(2, 6, "outside the pool"), (2, -1, "outside the pool"), (2, 3, "request 1 still owns")],
)
def test_a_wrong_grant_is_refused(request_id, block, complaint):
    with pytest.raises(FakeShardError, match=complaint):
        filled().grant(request_id, [block])


def test_a_freed_block_can_be_granted_again_and_is_empty():
    memory = filled()
    memory.free(1, [3, 1])
    memory.grant(2, [3])
    memory.write(2, [3], 0, TOKENS[:4])
    memory.grant(1, [1])
    assert memory.digest([3, 1]) == digest_of(
        key_of(token, i) for i, token in enumerate(TOKENS[:4])
    )


@pytest.mark.parametrize("position", [0, 3, 4, 6])
def test_a_place_is_written_once_and_in_order(position):
    with pytest.raises(FakeShardError, match=f"writes position {position}"):
        filled().write(1, [3, 1], position, [1])


def test_writing_past_the_table_is_refused():
    memory = filled()
    with pytest.raises(FakeShardError, match="none for position 8"):
        memory.write(1, [3, 1], 5, [1, 2, 3, 4])


def test_blocks_are_copied_to_the_host_and_back():
    memory = filled()
    digest = memory.digest([3, 1])
    memory.copy(BlockCopy(0, 3, 1, 70))
    memory.free(1, [3])
    memory.grant(2, [3])
    memory.grant(1, [5])
    memory.copy(BlockCopy(1, 70, 0, 5))
    assert memory.digest([5, 1]) == digest
    memory.copy(BlockCopy(0, 5, 0, 0))
    assert memory.digest([0, 1]) == digest
    with pytest.raises(FakeShardError, match="host block 71"):
        memory.copy(BlockCopy(1, 71, 0, 5))
