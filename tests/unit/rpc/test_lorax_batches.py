"""LoRAX's cached batches over the toy engine."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
from tests.helpers.oracle import FREE, Oracle
from tests.helpers.thread_ranks import run_ranks
from tests.helpers.toy_paged_model import NAN_ID, POISON_ID, expected_tokens, make_engine

from lorax_contract.errors import GenerationError, ShardError, ValidationError
from lorax_proto import generate_pb2 as pb
from lorax_shard.engine.drafter import Drafter, DraftSettings
from lorax_shard.engine.self_test import DeviceBrokenError
from lorax_shard.rpc.lorax_batches import LoraxBatches

A, B, C = [7, 9, 11, 13, 15], [40, 41, 42], [90, 91]


def request(request_id, ids, *, max_new_tokens=5, **fields):
    return pb.Request(
        id=request_id,
        tokenized_inputs=pb.TokenizedInputs(ids=ids),
        stopping_parameters=pb.StoppingCriteriaParameters(max_new_tokens=max_new_tokens),
        **fields,
    )


def batch(batch_id, *requests):
    return pb.Batch(id=batch_id, requests=requests, size=len(requests))


def prefill(batches, message, cached_id):
    return batches.prefill(message.id, batches.read(message), cached_id)


def ids_of(reply, request_id):
    return [i for g in reply.generations if g.request_id == request_id for i in g.next_tokens.ids]


def decode_all(batches, batch_id, count):
    """Return the tokens per request of ``count`` decodes."""
    tokens = {}
    for _ in range(count):
        for generation in batches.decode([batch_id]).generations:
            tokens.setdefault(generation.request_id, []).extend(generation.next_tokens.ids)
    return tokens


def test_prefill_and_decode_with_blocks_given_up_front():
    batches = LoraxBatches(make_engine())
    message = batch(8, request(1, A, blocks=[9, 3, 5]), request(2, B, blocks=[1, 2]))
    reply = prefill(batches, message, None)
    assert [g.prefill_tokens_length for g in reply.generations] == [5, 3]
    assert (reply.batch.id, list(reply.batch.request_ids), reply.batch.size) == (8, [1, 2], 2)
    assert (reply.batch.max_tokens, reply.batch.current_tokens) == (20, 2)
    tokens = decode_all(batches, 8, 3)
    assert ids_of(reply, 1) + tokens[1] == expected_tokens(A, 4)
    assert ids_of(reply, 2) + tokens[2] == expected_tokens(B, 4)
    last = batches.decode([8])
    assert last.batch is None
    assert [g.generated_text.generated_tokens for g in last.generations] == [5, 5]
    assert last.generations[0].generated_text.finish_reason == pb.FINISH_REASON_LENGTH
    assert last.generations[0].prefill_tokens_length == 0
    assert not last.generations[0].generated_text.HasField("seed")


def test_the_shard_takes_free_blocks_when_none_are_given():
    engine = make_engine(num_blocks=8)
    batches = LoraxBatches(engine)
    prefill(batches, batch(1, request(1, A), request(2, B)), None)
    held = [engine.batch.blocks_of(row) for row in engine.batch]
    assert held == [[1, 2, 3], [4, 5]]
    with pytest.raises(ValidationError, match="request 3: needs 3 blocks, but only 2"):
        prefill(batches, batch(2, request(3, A)), None)
    assert decode_all(batches, 1, 4)[1] == expected_tokens(A, 5)[1:]
    prefill(batches, batch(2, request(3, A), request(4, C)), None)
    assert decode_all(batches, 2, 2)[3] == expected_tokens(A, 3)[1:]


def test_a_long_prompt_is_computed_in_steps_of_the_budget():
    engine = make_engine()
    batches = LoraxBatches(engine, max_step_tokens=4)
    prompt = list(range(20, 31))
    reply = prefill(batches, batch(1, request(1, prompt), request(2, B)), None)
    assert max(sum(lens) for lens in engine.model.passes) == 4
    assert ids_of(reply, 1) == expected_tokens(prompt, 1)
    assert ids_of(reply, 2) == expected_tokens(B, 1)
    assert decode_all(batches, 1, 2)[2] == expected_tokens(B, 3)[1:]


def test_chunk_len_stops_early_and_decodes_go_on_with_the_prompt():
    engine = make_engine()
    batches = LoraxBatches(engine, max_step_tokens=4)
    prompt = list(range(20, 31))
    reply = prefill(batches, batch(1, request(1, prompt, chunk_len=3)), None)
    assert not reply.generations
    assert reply.batch.current_tokens == 8
    second = batches.decode([1])
    assert not second.generations
    third = batches.decode([1])
    assert third.generations[0].prefill_tokens_length == 11
    assert ids_of(third, 1) == expected_tokens(prompt, 1)
    assert engine.model.passes == [[3], [4], [4]]


def test_w27_a_running_row_beside_new_ones_does_not_report_its_prompt_again():
    engine = make_engine()
    batches = LoraxBatches(engine)
    prefill(batches, batch(1, request(1, A)), None)
    reply = prefill(batches, batch(2, request(2, B)), 1)
    assert engine.model.passes[-1] == [1, 3]
    assert reply.batch.id == 1
    assert ids_of(reply, 1) == expected_tokens(A, 2)[1:]
    lengths = {g.request_id: g.prefill_tokens_length for g in reply.generations}
    assert lengths == {1: 0, 2: 3}
    tokens = decode_all(batches, 1, 2)
    assert tokens == {1: expected_tokens(A, 4)[2:], 2: expected_tokens(B, 3)[1:]}


def test_cached_tokens_are_not_computed_again():
    engine = make_engine()
    batches = LoraxBatches(engine)
    prefill(batches, batch(1, request(1, A, blocks=[1, 2, 3])), None)
    reply = prefill(
        batches, batch(2, request(2, [*A[:4], 99], blocks=[1, 6, 7], cache_len=4)), None
    )
    assert engine.model.passes[-1] == [1]
    assert ids_of(reply, 2) == expected_tokens([*A[:4], 99], 1)


def test_decode_joins_batches_under_the_first_id():
    batches = LoraxBatches(make_engine())
    prefill(batches, batch(1, request(1, A)), None)
    prefill(batches, batch(2, request(2, B)), None)
    reply = batches.decode([2, 1])
    assert (reply.batch.id, list(reply.batch.request_ids)) == (2, [2, 1])
    assert ids_of(reply, 1) == expected_tokens(A, 2)[1:]
    with pytest.raises(ValidationError, match="batch 1 is not cached"):
        batches.decode([1])
    assert decode_all(batches, 2, 1) == {2: expected_tokens(B, 3)[2:], 1: expected_tokens(A, 3)[2:]}


def test_ended_rows_stay_members_until_they_are_filtered_out():
    engine = make_engine()
    batches = LoraxBatches(engine)
    reply = prefill(batches, batch(1, request(1, A, max_new_tokens=1), request(2, B)), None)
    assert list(reply.batch.request_ids) == [1, 2]
    assert reply.batch.current_tokens == 1
    assert decode_all(batches, 1, 1) == {2: expected_tokens(B, 2)[1:]}
    kept = batches.filter(1, [2])
    assert (list(kept.request_ids), kept.size) == ([2], 1)
    assert decode_all(batches, 1, 1) == {2: expected_tokens(B, 3)[2:]}


def test_filter_drops_running_rows():
    engine = make_engine()
    batches = LoraxBatches(engine)
    prefill(batches, batch(1, request(1, A), request(2, B), request(3, C)), None)
    batches.filter(1, [3, 1])
    assert 2 not in engine.batch
    assert set(decode_all(batches, 1, 1)) == {1, 3}
    for keep, words in (([2], "no request 2"), ([], "ClearCache")):
        with pytest.raises(ValidationError, match=words):
            batches.filter(1, keep)


def test_clear_drops_one_batch_or_all():
    engine = make_engine()
    batches = LoraxBatches(engine)
    for number in (1, 2, 3):
        prefill(batches, batch(number, request(number, A)), None)
    batches.clear(2)
    batches.clear(77)
    assert [row.request_id for row in engine.batch] == [1, 3]
    batches.clear(None)
    assert len(engine.batch) == 0
    with pytest.raises(ValidationError):
        batches.decode([1])


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (batch(2), "no requests"),
        (batch(2, request(5, C), request(6, [])), "request 6: the prompt is empty|request 6"),
        (batch(2, request(5, C), request(6, [999])), "request 6: token id 999"),
        (batch(2, request(5, C), request(6, A, blocks=[8, 99, 7])), "request 6: block 99"),
        (batch(2, request(5, C), request(6, A, blocks=[8, 7])), "request 6: 2 blocks"),
        (batch(2, request(5, C), request(1, A)), "request 1: request 1 is resident"),
        (batch(2, request(5, C), request(5, C)), "request 5 is resident"),
        (batch(2, request(5, C), request(6, A, adapter_index=4)), "without adapters"),
        (batch(1, request(6, A)), "cached already"),
    ],
)
def test_a_request_that_cannot_be_taken_changes_nothing(message, words):
    engine = make_engine()
    batches = LoraxBatches(engine)
    prefill(batches, batch(1, request(1, A)), None)
    cached = None if message.id == 1 else 1
    with pytest.raises(ValidationError, match=words):
        prefill(batches, message, cached)
    assert [row.request_id for row in engine.batch] == [1]
    assert decode_all(batches, 1, 2) == {1: expected_tokens(A, 3)[1:]}


def test_a_row_that_fails_while_computed_takes_its_batch_along_and_no_other():
    engine = make_engine()
    batches = LoraxBatches(engine)
    prefill(batches, batch(1, request(1, A)), None)
    with pytest.raises(GenerationError, match="request 6"):
        prefill(batches, batch(2, request(5, C), request(6, [4, NAN_ID])), None)
    assert [row.request_id for row in engine.batch] == [1]
    with pytest.raises(ValidationError):
        batches.decode([2])
    assert decode_all(batches, 1, 2) == {1: expected_tokens(A, 3)[1:]}


def test_a_pass_that_fails_takes_its_batch_along_and_no_other():
    engine = make_engine()
    batches = LoraxBatches(engine)
    first = prefill(batches, batch(1, request(1, A)), None)
    with pytest.raises(GenerationError, match=r"for these 2 requests together: .*poison"):
        prefill(batches, batch(2, request(5, C), request(6, [4, POISON_ID])), None)
    assert len(engine.batch) == 1
    assert ids_of(first, 1) + decode_all(batches, 1, 2)[1] == expected_tokens(A, 3)


def test_a_device_that_broke_is_found_by_a_batch_that_fails(monkeypatch):
    engine = make_engine()
    monkeypatch.setattr(engine.model, "forward", Mock(side_effect=RuntimeError("bad address")))
    with pytest.raises(DeviceBrokenError, match="bad address"):
        prefill(LoraxBatches(engine), batch(2, request(5, C), request(6, B)), None)


def test_prefill_logprobs_alternatives_and_seed_are_told():
    batches = LoraxBatches(make_engine())
    parameters = pb.NextTokenChooserParameters(do_sample=True, seed=12, return_k_alternatives=2)
    message = request(
        1, A, max_new_tokens=1, prefill_logprobs=True, prefill_alternatives=3, parameters=parameters
    )
    (generation,) = prefill(batches, batch(1, message), None).generations
    assert list(generation.prefill_tokens.ids) == A
    assert len(generation.prefill_tokens.logprobs) == 5
    others = generation.prefill_tokens.alternative_tokens
    assert [len(each.ids) for each in others] == [0, 3, 3, 3, 3]
    assert len(generation.next_tokens.alternative_tokens[0].ids) == 2
    assert generation.generated_text.seed == 12


def test_rank_0_answers_for_all_and_every_rank_knows_the_ends():
    def work(group):
        batches = LoraxBatches(make_engine(group=group), rank=group.rank)
        message = batch(1, request(4, A, max_new_tokens=1), request(5, B, max_new_tokens=2))
        return prefill(batches, message, None), batches.decode([1])

    (first, last), (first_mute, last_mute) = run_ranks(2, work)
    assert [g.request_id for g in first.generations] == [4, 5]
    assert [g.request_id for g in last.generations] == [5]
    assert first_mute.generations == last_mute.generations == []
    assert first_mute.batch == first.batch
    assert (last.batch, last_mute.batch) == (None, None)


def test_nothing_runs_before_the_warm_up():
    engine = make_engine()
    engine.batch = type(engine.batch)(0, 4)
    with pytest.raises(ShardError, match="Warmup"):
        prefill(LoraxBatches(engine), batch(1, request(1, A)), None)


def test_decode_needs_batches():
    batches = LoraxBatches(make_engine())
    for ids, words in (([], "no batch"), ([1], "not cached"), ([3, 3], "twice")):
        with pytest.raises(ValidationError, match=words):
            batches.decode(ids)


def test_all_tokens_of_a_step_are_told_with_their_row():
    """Two rows, of which one has drafts that are kept: each generation has its own tokens."""
    known = [[*A, *expected_tokens(A, 9)]]
    oracle = Oracle(known, num_wrong_in_ten=0)
    drafter = Drafter(DraftSettings(3, 4, 1), lambda: oracle, FREE)
    batches = LoraxBatches(make_engine(drafter=drafter))
    first = prefill(
        batches, batch(8, request(1, A, max_new_tokens=9), request(2, B, max_new_tokens=9)), None
    )
    tokens = {1: ids_of(first, 1), 2: ids_of(first, 2)}
    ended = {}
    while len(ended) < 2:
        reply = batches.decode([8])
        for generation in reply.generations:
            tokens[generation.request_id] += generation.next_tokens.ids
            assert len(generation.next_tokens.texts) == len(generation.next_tokens.ids)
            if generation.HasField("generated_text"):
                ended[generation.request_id] = generation.generated_text
    assert tokens == {1: expected_tokens(A, 9), 2: expected_tokens(B, 9)}
    assert [ended[each].generated_tokens for each in (1, 2)] == [9, 9]
    assert ended[1].skipped_tokens > 2
    assert ended[2].skipped_tokens == 0
