"""How the answers of several ranks become one."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.helpers.in_loop import in_loop
from tests.helpers.plans import make_plan, make_spec

from lorax_contract.adapters import AdapterQuery, AdapterRef, AdapterUnavailableError, Reason
from lorax_contract.errors import ShardError
from lorax_contract.step import ShardInfo
from lorax_router.shards.fake.shard import FakeShard, expected_tokens, fake_fetched
from lorax_router.shards.group import ShardGroup, merge_infos

INFO = ShardInfo(
    epoch=1,
    world_size=2,
    model_type="llama",
    dtype="float32",
    device_type="cpu",
    block_size=16,
    vocab_size=100,
    max_positions=0,
    num_blocks=10,
    max_depth=2,
    shard_uris=("a",),
)


@in_loop
async def test_rank_0_answers_for_all():
    shards = [FakeShard(rank=rank, world_size=3) for rank in range(3)]
    group = ShardGroup(shards)
    spec = make_spec(2, max_new_tokens=1, ignore_eos=True)
    outcome = await group.step(make_plan(1, [(2, 3, [0])], [spec]))
    assert (outcome.row_ids, outcome.tokens.ids) == ([2], expected_tokens(spec))
    assert [len(shard.steps) for shard in shards] == [1, 1, 1]
    await group.close()


@in_loop
async def test_ranks_with_stores_of_their_own_fetch_for_themselves():
    query = AdapterQuery(ref=AdapterRef(source="hub", id="org/poet"))
    for has_one_store, asked in ((True, [1, 0, 0]), (False, [1, 1, 1])):
        shards = [FakeShard(rank=rank, world_size=3) for rank in range(3)]
        group = ShardGroup(shards, has_one_store=has_one_store)
        assert await group.fetch_adapter(query) == fake_fetched(query)
        assert [len(shard.queries) for shard in shards] == asked
        # Each of the others is told what rank 0 has.
        wanted = [each.wanted for shard in shards[1:] for each in shard.queries]
        assert wanted == [fake_fetched(query)] * (sum(asked) - 1)
        await group.close()


@in_loop
async def test_ranks_that_fetched_something_else_do_not_compute_together():
    query = AdapterQuery(ref=AdapterRef(source="hub", id="org/poet"))
    other = fake_fetched(AdapterQuery(ref=AdapterRef(source="hub", id="org/pirate")))
    shards = [FakeShard(rank=rank, world_size=2) for rank in range(2)]
    shards[1].on_fetch = lambda query: other
    group = ShardGroup(shards, has_one_store=False)
    with pytest.raises(AdapterUnavailableError, match="not the same for all ranks") as raised:
        await group.fetch_adapter(query)
    assert raised.value.reason is Reason.TRANSIENT
    await group.close()


def test_limits_that_differ_are_the_least():
    one = replace(INFO, num_blocks=7, max_positions=2048, window_size=None, max_depth=3)
    two = replace(INFO, num_blocks=9, max_positions=0, window_size=64, shard_uris=("b",))
    merged = merge_infos([one, two])
    assert (merged.num_blocks, merged.max_positions) == (7, 2048)
    assert (merged.window_size, merged.max_depth) == (64, 2)
    assert merged.shard_uris == ("a", "b")


def test_the_fullest_rank_counts_and_all_are_told():
    full, spacious = (("kv_cache", 8), ("unused", 1)), (("kv_cache", 8), ("unused", 5))
    merged = merge_infos([replace(INFO, memory=spacious), replace(INFO, memory=full)])
    assert merged.memory == full
    assert merged.rank_memory == (spacious, full)


@pytest.mark.parametrize(
    ("name", "value"),
    [("epoch", 2), ("model_type", "gpt2"), ("block_size", 8), ("vocab_size", 99)],
)
def test_ranks_that_do_not_belong_together_are_refused(name, value):
    with pytest.raises(ShardError, match=f"differ in {name}"):
        merge_infos([INFO, replace(INFO, **{name: value})])


def test_a_group_must_be_whole():
    with pytest.raises(ShardError, match="group of 2, but 1 ranks"):
        merge_infos([INFO])


def test_a_group_needs_a_rank():
    with pytest.raises(ValueError, match="at least one"):
        ShardGroup([])


@in_loop
async def test_the_least_pool_is_the_groups():
    group = ShardGroup([FakeShard(rank=r, world_size=2, num_blocks=9 - r) for r in range(2)])
    from lorax_contract.step import WarmupSpec

    spec = WarmupSpec(max_input_length=1, max_total_tokens=2, max_step_tokens=3, max_rows=1)
    assert await group.warmup(spec) == 8
    assert (await group.info()).num_blocks == 8


@in_loop
async def test_closing_closes_every_rank_whatever_happens():
    closed = []

    class Closing(FakeShard):
        async def close(self):
            closed.append(self.rank)
            if self.rank == 0:
                raise OSError("stuck")

    group = ShardGroup([Closing(rank=r, world_size=3) for r in range(3)])
    with pytest.raises(OSError, match="stuck"):
        await group.close()
    assert closed == [0, 1, 2]
