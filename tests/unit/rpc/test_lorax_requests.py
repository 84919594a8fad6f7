"""LoRAX's requests: what zeros mean, how text is cut, what is refused."""

from __future__ import annotations

import pytest
from tests.helpers.toy_paged_model import toy_tokenizer

from lorax_contract.constraint import ConstraintKind
from lorax_contract.errors import ValidationError
from lorax_contract.step import LogitBias
from lorax_proto import generate_pb2 as pb
from lorax_shard.rpc.lorax_requests import read_request


def request(*, ids=(5, 6, 7, 8, 9), max_new_tokens=4, parameters=None, **fields):
    return pb.Request(
        id=3,
        tokenized_inputs=pb.TokenizedInputs(ids=ids),
        parameters=pb.NextTokenChooserParameters(**(parameters or {})),
        stopping_parameters=pb.StoppingCriteriaParameters(max_new_tokens=max_new_tokens),
        **fields,
    )


def read(message, max_input_length=0):
    return read_request(message, toy_tokenizer(), 4, max_input_length)


@pytest.mark.parametrize(
    ("parameters", "sampled"),
    [
        ({}, False),
        ({"temperature": 1.0, "top_p": 1.0, "typical_p": 1.0}, False),
        ({"repetition_penalty": 1.3, "seed": 4}, False),
        ({"do_sample": True}, True),
        ({"temperature": 0.5}, True),
        ({"top_k": 3}, True),
        ({"top_p": 0.5}, True),
        ({"typical_p": 0.5}, True),
        ({"min_p": 0.1}, True),
    ],
)
def test_sampling_is_on_when_a_parameter_asks_for_it(parameters, sampled):
    assert read(request(parameters=parameters)).new_row.spec.sampling.do_sample is sampled


def test_a_schema_binds_the_output():
    constraint = read(request(parameters={"schema": '{"type": "object"}'})).new_row.spec.constraint
    assert (constraint.kind, constraint.text) == (
        ConstraintKind.JSON_SCHEMA, '{"type": "object"}',
    )  # fmt: skip
    assert read(request()).new_row.spec.constraint is None


def test_zeros_are_off():
    sampling = read(request()).new_row.spec.sampling
    assert (sampling.temperature, sampling.top_p, sampling.typical_p) == (1.0, 1.0, 1.0)
    assert (sampling.repetition_penalty, sampling.top_k, sampling.min_p) == (1.0, 0, 0.0)


def test_text_is_tokenized_here_and_cut_from_the_left():
    text = "the quick brown fox"
    whole = toy_tokenizer().encode(text).ids
    plain = request(ids=(), inputs=text)
    assert list(read(plain).new_row.spec.prompt_ids) == whole
    cut = request(ids=(), inputs=text, truncate=3)
    assert list(read(cut).new_row.spec.prompt_ids) == whole[-3:]
    assert list(read(request(truncate=2)).new_row.spec.prompt_ids) == [8, 9]


def test_chunks_and_cached_tokens_count_from_the_start():
    got = read(request(cache_len=1, chunk_len=2, blocks=[4, 2, 9]))
    assert (got.num_cached, got.chunk_end, got.blocks) == (1, 3, [4, 2, 9])
    assert got.num_reserved_tokens == 9
    assert read(request(chunk_len=99)).chunk_end == 5


def test_slots_that_follow_the_blocks_are_taken():
    slots = [16, 17, 18, 19, 8, 9]
    assert read(request(blocks=[4, 2], slots=slots)).blocks == [4, 2]


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (request(max_new_tokens=0), "max_new_tokens"),
        (request(chunk_len=0), "chunk_len"),
        (request(cache_len=5), "cache_len 5"),
        (request(truncate=2, cache_len=2), "cache_len 2"),
        (request(blocks=[4, 2], slots=[8, 9, 10, 11, 16]), "slots"),
        (request(blocks=[4, 2], slots=[16]), "slots"),
    ],
)
def test_what_is_refused_names_the_request(message, words):
    with pytest.raises(ValidationError, match=words) as caught:
        read(message)
    assert "request 3" in str(caught.value)


def test_images_are_refused():
    message = request()
    message.tokenized_inputs.input_chunks.add(image=pb.Image(data=b"x", mimetype="image/png"))
    with pytest.raises(ValidationError, match="images"):
        read(message)


def test_long_prompts_need_truncate():
    with pytest.raises(ValidationError, match="set truncate"):
        read(request(), max_input_length=4)
    assert len(read(request(truncate=4), max_input_length=4).new_row.spec.prompt_ids) == 4


def test_a_watermark_and_our_own_fields_are_read():
    parameters = {
        "watermark": True, "logit_bias_ids": [5, 9], "logit_bias_values": [1.5, -100.0],
        "raw_logprobs": True,
    }  # fmt: skip
    message = request(parameters=parameters, prefill_logprobs=True, prefill_alternatives=2)
    message.stopping_parameters.min_new_tokens = 3
    spec = read(message).new_row.spec
    assert (spec.sampling.watermark, spec.sampling.raw_logprobs) == (True, True)
    assert spec.sampling.logit_bias == LogitBias((5, 9), (1.5, -100.0))
    assert spec.sampling.num_prompt_alternatives == 2
    assert spec.stopping.min_new_tokens == 3


def test_a_row_without_tokens_is_refused_as_lorax_refuses_it():
    with pytest.raises(ValidationError, match="max_new_tokens must be at least 1"):
        read(request(max_new_tokens=0))
