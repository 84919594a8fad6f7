"""FakeShard refuses broken plans, follows its script, and computes what its oracle says."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter

import pytest
from tests.helpers.contents import content
from tests.helpers.in_loop import in_loop
from tests.helpers.plans import make_plan, make_spec

from lorax_contract.errors import ShardError, ShardUnavailableError, StaleEpochError
from lorax_contract.step import BlockCopy, FinishCode, NewRow, WarmupSpec
from lorax_router.core.ports import ShardClient
from lorax_router.shards.fake.model import digest_of, key_of
from lorax_router.shards.fake.shard import FakeModel, FakeShard, FakeShardError, expected_tokens

SPEC = make_spec(1, [1, 2, 3], max_new_tokens=9, ignore_eos=True)
OTHER = make_spec(2, [1, 2, 3], max_new_tokens=9, ignore_eos=True)


async def started(**options) -> FakeShard:
    """A shard with request 1 resident after its first token, in block 0 of four."""
    shard = FakeShard(num_blocks=4, **options)
    await shard.step(make_plan(1, [(1, 3, [0])], [SPEC]))
    return shard


BROKEN = {
    "not resident": make_plan(2, [(2, 1, [])]),
    "enters but is resident": make_plan(2, new=[SPEC]),
    "without a prompt": make_plan(2, new=[make_spec(2, [])]),
    "dropped but not resident": make_plan(2, drop=[2]),
    "request 1 still owns": make_plan(2, [(2, 3, [0])], [OTHER]),
    "outside the pool": make_plan(2, [(2, 3, [4])], [OTHER]),
    "has 0 blocks, none for position 0": make_plan(2, [(2, 3, [])], [OTHER]),
    "to compute 2 tokens from position 3, but 4 are known": make_plan(2, [(1, 2, [1])]),
    "to compute 0 tokens": make_plan(2, [(1, 0, [])]),
    "names a request twice": make_plan(2, [(1, 1, []), (1, 1, [])]),
    "adapter 7, which is not active": make_plan(2, new=[make_spec(2, adapter=7)]),
    "adapter 7 is activated but was not prepared": make_plan(2, activate=[7]),
    "host block 3 is read": make_plan(2, copies=[BlockCopy(1, 3, 0, 0)]),
}


@pytest.mark.parametrize("complaint", BROKEN)
@in_loop
async def test_a_broken_plan_is_refused_and_noted(complaint):
    shard = await started()
    with pytest.raises(FakeShardError, match=complaint):
        await shard.step(BROKEN[complaint])
    assert len(shard.violations) == 1


@in_loop
async def test_blocks_that_do_not_add_up_are_refused():
    shard = await started()
    plan = make_plan(2, [(1, 1, [])])
    plan.new_blocks = [3]
    with pytest.raises(FakeShardError, match="grants 0 blocks but names 1"):
        await shard.step(plan)


@in_loop
async def test_an_adapter_does_not_cease_under_a_live_row():
    shard = FakeShard()
    await shard.prepare_adapter(7, content("digest"))
    row = make_spec(1, adapter=7, max_new_tokens=5, ignore_eos=True)
    await shard.step(make_plan(1, [(1, 3, [0])], [row], activate=[7]))
    with pytest.raises(ShardError, match="active"):
        await shard.release_adapter(7)
    with pytest.raises(FakeShardError, match="ceases while request 1 uses it"):
        await shard.step(make_plan(2, deactivate=[7]))


@in_loop
async def test_more_calls_in_flight_than_the_depth_are_refused():
    shard = FakeShard(max_depth=2)
    shard.hold()
    waiting = [asyncio.create_task(shard.step(make_plan(seq))) for seq in (1, 2)]
    await shard.arrived(2)
    with pytest.raises(FakeShardError, match="more than 2 calls"):
        await shard.step(make_plan(3))
    shard.let_go()
    await asyncio.gather(*waiting)
    await shard.step(make_plan(3))


@in_loop
async def test_an_overwritten_block_changes_the_output():
    """The oracle notices what no rule forbids: a copy over a live row's block."""
    shard = await started()
    await shard.step(make_plan(2, [(2, 3, [1])], [make_spec(2, [9, 9, 9], ignore_eos=True)]))
    copied = await shard.step(make_plan(3, [(1, 1, [])], copies=[BlockCopy(0, 1, 0, 0)]))
    assert copied.tokens.ids != expected_tokens(SPEC)[1:2]


@in_loop
async def test_rows_that_finished_are_skipped_and_their_blocks_are_free():
    shard = FakeShard(num_blocks=2)
    spec = make_spec(1, [1, 2, 3], max_new_tokens=1)
    await shard.step(make_plan(1, [(1, 3, [0])], [spec]))
    outcome = await shard.step(make_plan(2, [(1, 1, [1]), (2, 3, [0])], [OTHER]))
    assert outcome.row_ids == [2]
    assert shard.batch.live == [2]
    await shard.step(make_plan(3, drop=[1]))
    assert shard.batch.num_resident == 1
    assert shard.violations == []


@pytest.mark.parametrize(
    ("changes", "finish"),
    [
        ({"max_new_tokens": 3}, FinishCode.LENGTH),
        ({"stop_token_ids": (3,)}, FinishCode.STOP_SEQUENCE),
        ({"stop_sequences": ("t3 t",)}, FinishCode.STOP_SEQUENCE),
        ({"ignore_eos": False}, FinishCode.EOS_TOKEN),
    ],
)
@in_loop
async def test_requests_end_as_their_parameters_say(changes, finish):
    model = FakeModel(vocab_size=6, eos_token_ids=frozenset({2}))
    options = {"max_new_tokens": 200, "ignore_eos": True, **changes}
    spec = make_spec(1, [4, 4, 1], **options)
    tokens = model.expected_tokens(spec)
    shard = FakeShard(model, block_size=300)
    outcome = await shard.step(make_plan(1, [(1, 3, [0])], [spec]))
    got = list(outcome.tokens.ids)
    seq = 1
    while outcome.finish == [FinishCode.RUNNING]:
        seq += 1
        outcome = await shard.step(make_plan(seq, [(1, 1, [])]))
        got += outcome.tokens.ids
    assert outcome.finish == [finish]
    assert got == tokens
    assert len(got) <= 200
    if finish is FinishCode.EOS_TOKEN:
        assert outcome.tokens.special == [True]
        assert outcome.details[1].generated_text == model.text(got[:-1])


def test_the_tokens_depend_on_prompt_adapter_seed_and_drawing():
    variants = [
        SPEC,
        make_spec(1, [1, 3, 2], max_new_tokens=9, ignore_eos=True),
        make_spec(1, [1, 2, 3], max_new_tokens=9, ignore_eos=True, adapter=1),
        make_spec(1, [1, 2, 3], max_new_tokens=9, ignore_eos=True, do_sample=True, seed=1),
        make_spec(1, [1, 2, 3], max_new_tokens=9, ignore_eos=True, do_sample=True, seed=2),
    ]
    outputs = {tuple(expected_tokens(spec)) for spec in variants}
    assert len(outputs) == len(variants)
    assert expected_tokens(OTHER) == expected_tokens(SPEC)
    assert all(len(output) == 9 for output in outputs)


def test_sequences_do_not_share_a_digest():
    digests = {
        digest_of(key_of(token, i) for i, token in enumerate(tokens))
        for length in range(1, 7)
        for tokens in itertools.product(range(4), repeat=length)
    }
    assert len(digests) == sum(4**length for length in range(1, 7))


def test_tokens_are_spread_over_the_vocabulary():
    model = FakeModel(vocab_size=50)
    counts = Counter(
        token
        for seed in range(100)
        for token in model.expected_tokens(
            make_spec(1, [seed], max_new_tokens=100, ignore_eos=True, do_sample=True, seed=seed)
        )
    )
    assert len(counts) == 50
    # 200 each on average.
    assert 120 < min(counts.values()) <= max(counts.values()) < 300


def test_the_stop_of_a_resumed_request_counts_its_past():
    model = FakeModel()
    assert model.finish(make_spec(1, max_new_tokens=2), [5, 6]) is FinishCode.LENGTH
    assert model.finish(make_spec(1, max_new_tokens=3), [5, 6]) is FinishCode.RUNNING


@in_loop
async def test_a_resumed_row_reports_neither_its_prompt_nor_its_past():
    spec = make_spec(1, [1, 2, 3], max_new_tokens=9, ignore_eos=True, prompt_logprobs=True)
    shard = FakeShard()
    past = expected_tokens(spec)[:2]
    outcome = await shard.step(make_plan(1, [(1, 5, [0, 1])], [NewRow(spec, past)]))
    assert outcome.tokens.ids == expected_tokens(spec)[2:3]
    assert outcome.details == {}


@in_loop
async def test_rank_0_answers_for_all():
    shards = [FakeShard(rank=rank, world_size=2) for rank in range(2)]
    plan = make_plan(1, [(1, 3, [0]), (2, 3, [1])], [SPEC, OTHER])
    outcomes = [await shard.step(plan) for shard in shards]
    assert [outcome.row_ids for outcome in outcomes] == [[1, 2], []]


@in_loop
async def test_a_restart_forgets_everything_and_counts_anew():
    shard = await started()
    await shard.prepare_adapter(7, content("digest"))
    shard.restart()
    with pytest.raises(StaleEpochError):
        await shard.step(make_plan(2, [(1, 1, [])]))
    shard.reconnect()
    assert (await shard.info()).epoch == 2
    assert (shard.prepared, shard.batch.num_resident) == ({}, 0)
    outcome = await shard.step(make_plan(1, [(1, 3, [0])], [SPEC]))
    assert outcome.tokens.ids == expected_tokens(SPEC)[:1]


@in_loop
async def test_a_shard_that_died_comes_back_by_a_restart():
    shard = FakeShard()
    shard.die(at_seq=1)
    with pytest.raises(ShardUnavailableError):
        await shard.step(make_plan(1))
    shard.restart(epoch=9)
    shard.reconnect()
    await shard.step(make_plan(1))
    assert shard.epoch == 9


@in_loop
async def test_warmup_sizes_the_pool_before_the_first_row():
    shard = FakeShard(num_blocks=50)
    spec = WarmupSpec(
        max_input_length=1, max_total_tokens=2, max_step_tokens=3, max_rows=1, max_blocks=20
    )
    assert await shard.warmup(spec) == 20
    with pytest.raises(FakeShardError, match="outside the pool of 20"):
        await shard.step(make_plan(1, [(1, 3, [20])], [SPEC]))
    with pytest.raises(ShardError, match="before the first row"):
        await shard.warmup(spec)


@in_loop
async def test_a_step_takes_the_time_that_the_script_gives_it():
    asked = []

    def delay_s(plan):
        asked.append(plan.seq)
        return 0.001

    shard = FakeShard(step_delay_s=delay_s)
    await shard.step(make_plan(1))
    await shard.step(make_plan(2))
    assert asked == [1, 2]


@in_loop
async def test_closing_ends_what_is_held():
    shard = FakeShard()
    shard.hold()
    step = asyncio.create_task(shard.step(make_plan(1)))
    await shard.arrived(1)
    await shard.close()
    with pytest.raises(ShardUnavailableError):
        await step


@in_loop
async def test_an_old_reply_is_not_kept_for_ever():
    shard = FakeShard()
    for seq in range(1, 12):
        await shard.step(make_plan(seq))
    await shard.step(make_plan(11))
    with pytest.raises(ShardError, match="not kept any more"):
        await shard.step(make_plan(1))


def test_it_is_a_shard_client():
    client: ShardClient = FakeShard()
    assert client is not None


@in_loop
async def test_a_row_without_tokens_ends_when_its_prompt_is_computed():
    spec = make_spec(
        1, [1, 2, 3], max_new_tokens=0, prompt_logprobs=True, num_prompt_alternatives=2
    )
    shard = FakeShard()
    assert not (await shard.step(make_plan(1, [(1, 2, [0])], [spec]))).row_ids
    outcome = await shard.step(make_plan(2, [(1, 1, [])]))
    assert (outcome.row_ids, outcome.num_tokens, outcome.finish) == ([1], [0], [FinishCode.LENGTH])
    detail = outcome.details[1]
    assert detail.generated_text == ""
    assert detail.prompt_tokens.ids == [1, 2, 3]
    assert [each.ids for each in detail.prompt_alternatives] == [[], [2, 3], [3, 4]]
    assert expected_tokens(spec) == []
    assert shard.batch.memory.num_owned == 0


def test_nothing_but_the_limit_ends_an_output_of_the_least_length():
    model = FakeModel()
    stopping = {"stop_token_ids": (6,), "min_new_tokens": 2}
    assert model.finish(make_spec(1, max_new_tokens=9, **stopping), [5, 6]) is FinishCode.RUNNING
    assert model.finish(make_spec(1, max_new_tokens=2, **stopping), [5, 6]) is FinishCode.LENGTH
    assert (
        model.finish(make_spec(1, max_new_tokens=9, **stopping), [5, 5, 6])
        is FinishCode.STOP_SEQUENCE
    )
