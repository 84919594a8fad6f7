"""Whose calls a shard answers, whichever ShardClient makes them."""

from __future__ import annotations

import pytest
from tests.helpers.contents import content
from tests.helpers.in_loop import in_loop
from tests.helpers.plans import make_plan, make_spec

from lorax_contract.errors import StaleEpochError
from lorax_contract.step import AdapterHandle, WarmupSpec
from lorax_router.shards.fake.shard import expected_tokens

WARMUP = WarmupSpec(max_input_length=8, max_total_tokens=20, max_step_tokens=16, max_rows=4)


@in_loop
async def test_a_shard_that_restarted_refuses_calls_for_its_past(kind):
    async with kind.open(epoch=3) as (client, shards):
        for shard in shards:
            shard.restart()
        calls = [
            lambda: client.warmup(WARMUP),
            lambda: client.step(make_plan(1)),
            lambda: client.clear(1),
            lambda: client.prepare_adapter(AdapterHandle(1), content("abc")),
            lambda: client.release_adapter(AdapterHandle(1)),
        ]
        for call in calls:
            with pytest.raises(StaleEpochError, match="epoch 3"):
                await call()
        assert (await client.info()).epoch == 4
        with pytest.raises(StaleEpochError):
            await client.step(make_plan(1))
        assert all(shard.steps == [] for shard in shards)


@in_loop
async def test_shards_that_are_taken_over_are_as_empty_as_after_a_start(kind):
    spec = make_spec(1, max_new_tokens=9, ignore_eos=True)
    async with kind.open(epoch=3) as (client, shards):
        await client.warmup(WARMUP)
        await client.prepare_adapter(AdapterHandle(1), content("abc"))
        await client.step(make_plan(1, [(1, 3, [0])], [spec]))
        await client.take_over(5)
        assert (await client.info()).epoch == 5
        assert all(shard.prepared == {} for shard in shards)
        num_blocks = await client.warmup(WARMUP)
        # Neither the request's id nor the handle's content nor the number is taken.
        await client.prepare_adapter(AdapterHandle(1), content("another"))
        outcome = await client.step(make_plan(1, [(1, 3, [0])], [spec]))
        assert outcome.tokens.ids == expected_tokens(spec)[:1]
        assert all(shard.batch.memory.num_owned == 1 for shard in shards) and num_blocks
        for epoch in (3, 5):
            with pytest.raises(StaleEpochError, match="cannot begin"):
                await client.take_over(epoch)
