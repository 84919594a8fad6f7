"""What the engine loop may rely on, whichever ShardClient it is given."""

from __future__ import annotations

import asyncio
import math

import pytest
from tests.helpers.constraints import regex
from tests.helpers.contents import content
from tests.helpers.in_loop import in_loop
from tests.helpers.plans import drive, make_plan, make_spec, random_specs

from lorax_contract.adapters import (
    AdapterContent,
    AdapterPart,
    AdapterQuery,
    AdapterRef,
    AdapterUnavailableError,
    Combination,
    FetchedAdapter,
    MajoritySign,
    MergeSpec,
    Reason,
    refused,
)
from lorax_contract.errors import (
    LoraxError,
    ShardError,
    ShardUnavailableError,
    ValidationError,
)
from lorax_contract.step import AdapterHandle, FinishCode, NewRow, StepPlan, WarmupSpec
from lorax_router.core.scheduler import Scheduler
from lorax_router.shards.fake.shard import FakeModel, FakeShardError, expected_tokens

WARMUP = WarmupSpec(max_input_length=8, max_total_tokens=20, max_step_tokens=16, max_rows=4)


async def in_flight(client, plan: StepPlan) -> asyncio.Task:
    """Send a step and let it get on its way."""
    task = asyncio.create_task(client.step(plan))
    await asyncio.sleep(0)
    return task


async def arrived(shards, seq: int) -> None:
    for shard in shards:
        await shard.arrived(seq)


@in_loop
async def test_info_and_warmup_tell_the_size_of_the_pool(kind):
    async with kind.open(num_blocks=40, block_size=8, epoch=7, max_positions=99) as (client, _):
        before = await client.info()
        assert (before.epoch, before.world_size) == (7, kind.num_ranks)
        assert (before.block_size, before.max_positions, before.num_blocks) == (8, 99, 0)
        assert (before.max_depth, before.window_size) == (2, None)
        assert await client.warmup(WARMUP) == 40
        assert (await client.info()).num_blocks == 40


@in_loop
async def test_one_request_gets_its_tokens_step_by_step(kind):
    spec = make_spec(5, [1, 2, 3, 4, 5, 6], max_new_tokens=3, ignore_eos=True)
    async with kind.open() as (client, shards):
        chunk = await client.step(make_plan(1, [(5, 4, [9])], [spec]))
        assert (chunk.seq, chunk.row_ids, chunk.tokens.ids) == (1, [], [])
        first = await client.step(make_plan(2, [(5, 2, [3])]))
        second = await client.step(make_plan(3, [(5, 1, [])]))
        last = await client.step(make_plan(4, [(5, 1, [])]))
        assert [first.row_ids, first.num_tokens, first.finish] == [[5], [1], [0]]
        assert last.finish == [FinishCode.LENGTH]
        tokens = first.tokens.ids + second.tokens.ids + last.tokens.ids
        assert tokens == expected_tokens(spec)
        assert first.tokens.texts == [f" t{tokens[0]}"]
        assert first.tokens.special == [False]
        assert first.tokens.logprobs[0] < 0
        assert first.details == {}
        text = "".join(f" t{token}" for token in tokens)
        assert last.details[5].generated_text == text
        assert all(shard.batch.memory.num_owned == 0 for shard in shards)


@pytest.mark.parametrize("depth", [1, 2])
@in_loop
async def test_scheduled_requests_get_the_tokens_they_would_get_alone(kind, depth):
    specs = random_specs(depth, 20)
    scheduler = Scheduler(num_blocks=18, block_size=4, max_step_tokens=12, max_rows=6, depth=depth)
    async with kind.open(jitter_seed=depth, num_blocks=18) as (client, shards):
        assert await client.warmup(WARMUP) == 18
        output = await drive(client, scheduler, specs)
        assert output == {spec.request_id: expected_tokens(spec) for spec in specs}
        assert scheduler.stats().num_preemptions > 0
        for shard in shards:
            assert shard.violations == []
            assert (shard.batch.num_resident, shard.batch.memory.num_owned) == (0, 0)


@in_loop
async def test_steps_run_in_their_order_when_they_arrive_in_another(kind):
    spec = make_spec(1, [1, 2, 3], max_new_tokens=9, ignore_eos=True)
    async with kind.open() as (client, shards):
        second = await in_flight(client, make_plan(2, [(1, 1, [])]))
        await arrived(shards, 2)
        first = await client.step(make_plan(1, [(1, 3, [0])], [spec]))
        tokens = first.tokens.ids + (await second).tokens.ids
        assert tokens == expected_tokens(spec)[:2]


@in_loop
async def test_w24_random_arrival_on_each_rank_changes_nothing(kind):
    spec = make_spec(3, [1, 2, 3], max_new_tokens=30, ignore_eos=True)
    async with kind.open(jitter_seed=5, block_size=64) as (client, shards):
        tokens = []
        previous = await in_flight(client, make_plan(1, [(3, 3, [0])], [spec]))
        for seq in range(2, 31):
            current = await in_flight(client, make_plan(seq, [(3, 1, [])]))
            tokens += (await previous).tokens.ids
            previous = current
        tokens += (await previous).tokens.ids
        assert tokens == expected_tokens(spec)
        assert all(not shard.violations for shard in shards)


@in_loop
async def test_a_repeated_number_gets_the_stored_reply(kind):
    spec = make_spec(1, max_new_tokens=9, ignore_eos=True)
    async with kind.open() as (client, shards):
        plan = make_plan(1, [(1, 3, [0])], [spec])
        first, same = await asyncio.gather(client.step(plan), client.step(plan))
        later = await client.step(plan)
        assert first == same == later
        assert all(len(shard.steps) == 1 for shard in shards)


@in_loop
async def test_a_caller_who_gave_up_can_ask_again(kind):
    spec = make_spec(1, max_new_tokens=9, ignore_eos=True)
    async with kind.open() as (client, shards):
        plan = make_plan(1, [(1, 3, [0])], [spec])
        for shard in shards:
            shard.hold()
        given_up = await in_flight(client, plan)
        await arrived(shards, 1)
        given_up.cancel()
        with pytest.raises(asyncio.CancelledError):
            await given_up
        for shard in shards:
            shard.let_go()
        assert (await client.step(plan)).tokens.ids == expected_tokens(spec)[:1]
        assert all(len(shard.steps) == 1 for shard in shards)


@in_loop
async def test_w12_preparing_does_not_wait_for_a_slow_step(kind):
    spec = make_spec(1, max_new_tokens=1, adapter=4)
    handle = AdapterHandle(4)
    async with kind.open() as (client, shards):
        for shard in shards:
            shard.hold()
        slow = await in_flight(client, make_plan(1))
        await arrived(shards, 1)
        await client.prepare_adapter(handle, content("digest"))
        await client.health()
        await client.info()
        assert not slow.done()
        assert all(shard.prepared == {4: "digest"} for shard in shards)
        for shard in shards:
            shard.let_go()
        await slow
        outcome = await client.step(make_plan(2, [(1, 3, [0])], [spec], activate=[handle]))
        assert outcome.tokens.ids == expected_tokens(spec)
        assert outcome.tokens.ids != expected_tokens(make_spec(1, max_new_tokens=1))
        await client.step(make_plan(3, drop=[1], deactivate=[handle]))
        await client.release_adapter(handle)
        assert all(shard.prepared == {} for shard in shards)


@in_loop
async def test_the_rank_that_draws_gets_a_constraint_ready_or_says_why_not(kind):
    fine, bad = regex("a+"), regex("(")

    def refuse(constraint):
        if constraint == bad:
            raise ValidationError("no such pattern")

    async with kind.open() as (client, shards):
        shards[0].on_constraint = refuse
        await client.prepare_constraint(fine)
        await client.prepare_constraint(fine, content("abc"))
        with pytest.raises(ValidationError, match="no such pattern"):
            await client.prepare_constraint(bad)
        assert [shard.constraints for shard in shards] == [[fine, fine, bad]] + [
            [] for _ in shards[1:]
        ]


@in_loop
async def test_w12_a_slow_adapter_does_not_hold_up_steps(kind):
    spec = make_spec(1, max_new_tokens=1)
    async with kind.open(adapter_delay_s=3600) as (client, _):
        preparing = asyncio.create_task(client.prepare_adapter(AdapterHandle(1), content("digest")))
        await asyncio.sleep(0)
        outcome = await client.step(make_plan(1, [(1, 3, [0])], [spec]))
        assert outcome.tokens.ids == expected_tokens(spec)
        assert not preparing.done()
        preparing.cancel()
        await asyncio.gather(preparing, return_exceptions=True)


@in_loop
async def test_an_adapter_that_fails_on_one_rank_is_on_none(kind):
    handle = AdapterHandle(6)
    async with kind.open() as (client, shards):
        shards[-1].fail_adapter(handle, refused("no such digest"))
        with pytest.raises(AdapterUnavailableError, match="no such digest"):
            await client.prepare_adapter(handle, content("digest"))
        assert all(shard.prepared == {} for shard in shards)
        await client.prepare_adapter(AdapterHandle(7), content("digest"))
        assert all(shard.prepared == {7: "digest"} for shard in shards)


@in_loop
async def test_a_handle_never_names_another_digest(kind):
    async with kind.open() as (client, _):
        await client.prepare_adapter(AdapterHandle(1), content("one"))
        await client.prepare_adapter(AdapterHandle(1), content("one"))
        with pytest.raises(ShardError, match="new handle"):
            await client.prepare_adapter(AdapterHandle(1), content("two"))


@in_loop
async def test_a_row_that_fails_harms_no_other(kind):
    good = make_spec(1, [1, 2], max_new_tokens=2, ignore_eos=True)
    bad = make_spec(2, [3, 4], max_new_tokens=2, ignore_eos=True)
    async with kind.open() as (client, shards):
        for shard in shards:
            shard.fail_row(2, "the row is bad", from_seq=2)
        first = await client.step(make_plan(1, [(1, 2, [0]), (2, 2, [1])], [good, bad]))
        second = await client.step(make_plan(2, [(1, 1, []), (2, 1, [])]))
        third = await client.step(make_plan(3, drop=[1, 2]))
        assert sorted(first.row_ids) == [1, 2]
        rows = dict(zip(second.row_ids, zip(second.num_tokens, second.finish), strict=True))
        assert rows == {1: (1, FinishCode.LENGTH), 2: (0, FinishCode.ERROR)}
        assert second.tokens.ids == expected_tokens(good)[1:]
        assert second.details[2].error_code == "generation"
        assert second.details[2].error_text == "the row is bad"
        assert third.row_ids == []


@pytest.mark.parametrize(
    ("error", "kind_of_error"),
    [
        (ShardError("odd"), ShardError),
        (ShardUnavailableError("odd"), ShardUnavailableError),
    ],
)
@in_loop
async def test_a_step_that_fails_on_one_rank_fails(kind, error, kind_of_error):
    async with kind.open() as (client, shards):
        shards[-1].fail_step(1, error)
        with pytest.raises(LoraxError, match="odd") as caught:
            await client.step(make_plan(1))
        assert type(caught.value) is kind_of_error


@in_loop
async def test_a_rank_that_dies_ends_the_calls_in_flight(kind):
    async with kind.open() as (client, shards):
        for shard in shards:
            shard.hold()
        calls = [await in_flight(client, make_plan(seq)) for seq in (1, 2)]
        await arrived(shards, 1)
        await arrived(shards, 2)
        shards[-1].die()
        for call in calls:
            with pytest.raises(ShardUnavailableError):
                await call
        for call in (client.health, client.info, lambda: client.step(make_plan(2))):
            with pytest.raises(ShardUnavailableError):
                await call()


@in_loop
async def test_a_rank_that_dies_in_a_step_fails_it_and_all_after(kind):
    async with kind.open() as (client, shards):
        shards[-1].die(at_seq=2)
        await client.step(make_plan(1))
        for seq in (2, 3):
            with pytest.raises(ShardUnavailableError):
                await client.step(make_plan(seq))


@in_loop
async def test_clear_drops_all_rows_in_its_turn(kind):
    spec = make_spec(1, max_new_tokens=9)
    async with kind.open() as (client, shards):
        clearing = asyncio.create_task(client.clear(2))
        await asyncio.sleep(0)
        await client.step(make_plan(1, [(1, 3, [0])], [spec]))
        await clearing
        for shard in shards:
            assert (shard.batch.num_resident, shard.batch.memory.num_owned) == (0, 0)
        again = await client.step(make_plan(3, [(1, 3, [0])], [spec]))
        assert again.tokens.ids == expected_tokens(spec)[:1]


@in_loop
async def test_what_only_some_rows_have_arrives(kind):
    spec = make_spec(
        3, [1, 0, 3], max_new_tokens=2, ignore_eos=True, num_alternatives=2, prompt_logprobs=True
    )
    plain = make_spec(4, [1, 2], max_new_tokens=2, ignore_eos=True)
    async with kind.open() as (client, _):
        first = await client.step(make_plan(1, [(3, 3, [0]), (4, 2, [1])], [spec, plain]))
        second = await client.step(make_plan(2, [(3, 1, []), (4, 1, [])]))
        assert list(first.details) == [3]
        token = expected_tokens(spec)[0]
        (alternatives,) = first.details[3].alternatives
        assert alternatives.ids == [token, (token + 1) % 1000]
        assert alternatives.logprobs[0] > alternatives.logprobs[1]
        assert len(alternatives.texts) == 2
        prompt = first.details[3].prompt_tokens
        assert (prompt.ids, prompt.special) == ([1, 0, 3], [False, True, False])
        assert math.isnan(prompt.logprobs[0])
        assert prompt.logprobs[1] < 0
        assert first.details[3].generated_text is None
        assert second.details[3].prompt_tokens is None
        assert second.details[4].generated_text


@in_loop
async def test_a_row_that_comes_back_goes_on_where_it_was(kind):
    spec = make_spec(1, [1, 2, 3], max_new_tokens=4, ignore_eos=True, do_sample=True, seed=2**63)
    other = make_spec(2, [7, 8], max_new_tokens=4, ignore_eos=True)
    tokens = expected_tokens(spec)
    async with kind.open() as (client, _):
        first = await client.step(make_plan(1, [(1, 3, [0]), (2, 2, [1])], [spec, other]))
        start = first.row_ids.index(1)
        assert first.tokens.ids[start] == tokens[0]
        await client.step(make_plan(2, [(2, 1, [])], drop=[1]))
        back = make_plan(3, [(1, 4, [5])], [NewRow(spec, tokens[:1])])
        assert (await client.step(back)).tokens.ids == tokens[1:2]
        await client.step(make_plan(4, [(1, 1, [6])]))
        last = await client.step(make_plan(5, [(1, 1, [])]))
        assert (last.tokens.ids, last.finish) == (tokens[3:], [FinishCode.LENGTH])
        assert last.details[1].generated_text == FakeModel().text(tokens)


@in_loop
async def test_a_plan_that_breaks_the_contract_is_an_error(kind):
    async with kind.open() as (client, shards):
        with pytest.raises((FakeShardError, ShardError), match="not resident"):
            await client.step(make_plan(1, [(1, 1, [])]))
        # The first rank to refuse ends the call; the others may not have come to it.
        assert {len(shard.violations) for shard in shards} in ({1}, {0, 1})


@in_loop
async def test_a_failed_call_names_the_rank(group_kind):
    rank = min(1, group_kind.num_ranks - 1)
    async with group_kind.open() as (client, shards):
        shards[rank].fail_step(1, ShardError("odd"))
        shards[rank].fail_adapter(AdapterHandle(1), ShardError("odd"))
        calls = [
            lambda: client.step(make_plan(1)),
            lambda: client.prepare_adapter(AdapterHandle(1), content("digest")),
        ]
        for call in calls:
            with pytest.raises(ShardError, match=f"rank {rank} of {group_kind.num_ranks}.*odd"):
                await call()


@in_loop
async def test_an_adapter_is_fetched_with_all_that_is_known_of_it(kind):
    fetched = FetchedAdapter(
        version="v7",
        part=AdapterPart("abc", "def"),
        disk_bytes=10,
        device_bytes=20,
        max_rank=64,
        vocab_size=300,
        access="token",
        valid_s=12.5,
        downloaded=True,
        stale=True,
        timings={"resolve": 0.25, "download": 1.5},
        text_files=("tokenizer.json",),
        warnings=("it adds nothing",),
    )
    query = AdapterQuery(ref=AdapterRef.of("s3", "b/k", "7"), token="secret", refresh=True)
    async with kind.open() as (client, shards):
        shards[0].on_fetch = lambda _query: fetched
        shards[0].texts["def"] = {"tokenizer.json": b"{}", "chat_template.jinja": b"T"}
        assert await client.fetch_adapter(query) == fetched
        assert shards[0].queries == [query]
        asked = ["tokenizer.json", "vocab.json"]
        assert dict(await client.adapter_text("def", asked)) == {"tokenizer.json": b"{}"}


@in_loop
async def test_why_an_adapter_cannot_be_had_comes_through_word_for_word(kind):
    def fail(_query: AdapterQuery) -> FetchedAdapter:
        raise AdapterUnavailableError(Reason.TRANSIENT, "try later", retry_after_s=3.5)

    async with kind.open() as (client, shards):
        shards[0].on_fetch = fail
        with pytest.raises(AdapterUnavailableError) as caught:
            await client.fetch_adapter(AdapterQuery(ref=AdapterRef.of("hub", "a/b")))
        assert (caught.value.reason, caught.value.text) == (Reason.TRANSIENT, "try later")
        assert caught.value.retry_after_s == 3.5
        handle = AdapterHandle(3)
        shards[-1].fail_adapter(handle, AdapterUnavailableError(Reason.EVICTED, "is gone"))
        with pytest.raises(AdapterUnavailableError) as caught:
            await client.prepare_adapter(handle, content("abc"))
        assert (caught.value.reason, caught.value.text) == (Reason.EVICTED, "is gone")


@in_loop
async def test_a_merge_is_prepared_as_it_was_asked_for(kind):
    spec = MergeSpec(
        weights=(0.3, 1 / 3),
        combination=Combination.DARE_TIES,
        density=0.7,
        majority_sign=MajoritySign.FREQUENCY,
    )
    merged = AdapterContent(parts=(AdapterPart("a", "b"), AdapterPart("c", "d")), merge=spec)
    async with kind.open() as (client, shards):
        report = await client.prepare_adapter(AdapterHandle(1), merged)
        assert all(shard.prepared == {1: merged.key} for shard in shards)
        tiers = await client.adapter_tiers(merged.parts)
        assert tiers.device == {1: (merged.key, report.device_bytes)}
        assert (tiers.host.keys(), tiers.disk.keys()) == ({"a", "c"}, {"b", "d"})
        # Of many that are known those are told of that are asked for.
        tiers = await client.adapter_tiers(merged.parts[1:])
        assert tiers.device == {1: (merged.key, report.device_bytes)}
        assert (tiers.host.keys(), tiers.disk.keys()) == ({"c"}, {"d"})
        await client.release_adapter(AdapterHandle(1), merged.parts[:1])
        tiers = await client.adapter_tiers(merged.parts)
        assert (tiers.device, tiers.host.keys()) == ({}, {"c"})


@in_loop
async def test_the_end_of_a_row_without_tokens_arrives_with_its_prompt(kind):
    spec = make_spec(
        3, [1, 0, 3], max_new_tokens=0, prompt_logprobs=True, num_prompt_alternatives=2
    )
    other = make_spec(4, [1, 2], max_new_tokens=2, ignore_eos=True)
    async with kind.open() as (client, _):
        first = await client.step(make_plan(1, [(3, 3, [0]), (4, 2, [1])], [spec, other]))
        at = first.row_ids.index(3)
        assert (first.num_tokens[at], first.finish[at]) == (0, FinishCode.LENGTH)
        assert first.tokens.ids == expected_tokens(other)[:1]
        detail = first.details[3]
        assert detail.generated_text == ""
        assert detail.prompt_tokens.ids == [1, 0, 3]
        assert [each.ids for each in detail.prompt_alternatives] == [[], [0, 1], [3, 4]]
        assert len(detail.prompt_alternatives[1].texts) == 2
        second = await client.step(make_plan(2, [(4, 1, [])], drop=[3]))
        assert second.tokens.ids == expected_tokens(other)[1:2]
