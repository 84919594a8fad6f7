"""The validator: from a client's words to a request that can run."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tests.helpers.http_app import TEMPLATE, limits, word_tokenizer
from tests.helpers.inline_templates import InlineTemplates

from lorax_contract.errors import TemplateError, ValidationError
from lorax_contract.step import LogitBias, OutputKind
from lorax_router.core.request import RequestTerms
from lorax_router.service.callers import ANYBODY, Caller
from lorax_router.service.limits import RequestLimits
from lorax_router.service.prompts.encoding import EncodedText, TextToEncode
from lorax_router.service.prompts.tokenizer_pool import TokenizerPool
from lorax_router.service.requests import (
    ChatPrompt,
    GenerateParameters,
    GenerateRequest,
    MergedAdapters,
    TextPrompt,
    ValidRequest,
)
from lorax_router.service.validation import Validator, draw_seed


def validate(
    inputs: str,
    *,
    stream: bool = False,
    bounds: RequestLimits | None = None,
    template: str | None = TEMPLATE,
    chat: bool = False,
    caller: Caller = ANYBODY,
    **params: Any,
) -> ValidRequest:
    prompt = ChatPrompt.of_user(inputs) if chat else TextPrompt(inputs)
    parameters = GenerateParameters(**params)
    request = GenerateRequest(prompt=prompt, sent_text=inputs, parameters=parameters, caller=caller)

    async def run() -> ValidRequest:
        pool = TokenizerPool(word_tokenizer(), 1)
        validator = Validator(bounds or limits(), pool, InlineTemplates(template))
        try:
            return await validator.complete(validator.check(request, stream=stream))
        finally:
            pool.close()

    return asyncio.run(run())


def prompt(num_tokens: int) -> str:
    """A prompt of so many tokens, the start token included."""
    return " ".join(f"w{i}" for i in range(1, num_tokens))


def test_a_plain_request():
    valid = validate("w5 w6", max_new_tokens=4, stop=["x"], stop_token_ids=[3])
    assert valid.prompt_ids == [900, 5, 6]
    assert valid.stopping.max_new_tokens == 4
    assert valid.stopping.stop_sequences == ("x",)
    assert valid.stopping.stop_token_ids == (3,)
    assert not valid.details


def test_without_max_new_tokens_all_that_fits_may_be_generated():
    assert validate(prompt(10)).stopping.max_new_tokens == 20


@pytest.mark.parametrize(
    ("num_tokens", "max_new", "message"),
    [
        (21, None, "at most 20 tokens, got 21"),
        (21, 1, "at most 20 tokens, got 21"),
        (20, 11, "at most 30, got 20 `inputs` tokens and 11 `max_new_tokens`"),
        # The total comes first, as in LoRAX.
        (40, 5, "at most 30, got 40 `inputs` tokens and 5"),
        (40, None, "at most 20 tokens, got 40"),
    ],
)
def test_lengths_beyond_the_limits_are_refused(num_tokens, max_new, message):
    with pytest.raises(ValidationError, match=message):
        validate(prompt(num_tokens), max_new_tokens=max_new)


@pytest.mark.parametrize("params", [{}, {"truncate": 5}, {"chat": True}])
def test_a_text_that_can_never_fit_is_refused_before_it_is_tokenized(params, monkeypatch):
    tokenized: list[str] = []
    encode = TokenizerPool.encode

    async def noting(self: TokenizerPool, asked: TextToEncode) -> EncodedText:
        tokenized.append(asked.text)
        return await encode(self, asked)

    monkeypatch.setattr(TokenizerPool, "encode", noting)
    bounds = limits(max_input_chars=40)
    with pytest.raises(ValidationError, match="at most 40 characters, got 41"):
        validate("w" * 41, bounds=bounds, **params)
    assert tokenized == []
    validate("w" * (7 if "chat" in params else 40), bounds=bounds, **params)
    assert len(tokenized) == 1


def test_what_a_template_makes_of_a_text_is_bounded_too():
    with pytest.raises(ValidationError, match="at most 40 characters"):
        validate("w" * 39, bounds=limits(max_input_chars=40), chat=True)


def test_the_limits_themselves_are_accepted():
    assert validate(prompt(20), max_new_tokens=10).num_prompt_tokens == 20


def test_w21_truncate_counts_before_every_length_and_what_is_cut_never_runs():
    """LoRAX's router checks and caches uncut ids, of which its shard computes the tail."""
    valid = validate(prompt(500), truncate=6, max_new_tokens=24)
    assert valid.prompt_ids == [494, 495, 496, 497, 498, 499]
    assert valid.num_prompt_tokens == 6
    assert validate("w1", truncate=6).prompt_ids == [900, 1]


@pytest.mark.parametrize(
    ("params", "named"),
    [
        ({"truncate": 0}, "truncate"),
        ({"truncate": 21}, "truncate"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": -5}, "max_new_tokens"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "at most 4 sequences, got 5"),
        ({"stop": ["a", ""]}, "empty"),
        ({"stop_token_ids": [906]}, "906 is not a token"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"stop_token_ids": [1] * 65}, "at most 64 ids"),
        ({"logit_bias": {906: 1.0}}, "906 is not a token"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias"),
        ({"logit_bias": {3: 100.5}}, "from -100 to 100, got 100.5 for token 3"),
        ({"logit_bias": {3: float("nan")}}, "logit_bias"),
        ({"logit_bias": dict.fromkeys(range(301), 1.0)}, "at most 300 tokens"),
        ({"min_new_tokens": -1}, "min_new_tokens"),
        ({"min_new_tokens": 6, "max_new_tokens": 5}, "at most `max_new_tokens`"),
        ({"num_prompt_alternatives": 2}, "decoder_input_details"),
        ({"num_prompt_alternatives": 0, "decoder_input_details": True}, "from 1 to 20"),
        ({"num_prompt_alternatives": 21, "decoder_input_details": True}, "from 1 to 20"),
        ({"output": OutputKind.PROMPT, "max_new_tokens": 1}, "must be 0"),
        ({"output": OutputKind.PROMPT, "min_new_tokens": 1}, "min_new_tokens"),
        ({"adapter_id": "some/adapter"}, "serves the base model only"),
        ({"merged_adapters": MergedAdapters(ids=["a", "b"])}, "serves the base model only"),
        (
            {"adapter_id": "a", "merged_adapters": MergedAdapters(ids=["b"])},
            "exclude each other",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(params, named):
    with pytest.raises(ValidationError, match=named):
        validate("w1", **params)


@pytest.mark.parametrize("adapter_id", [None, "", "__base_model__"])
def test_the_base_model_goes_by_several_names(adapter_id):
    assert validate("w1", adapter_id=adapter_id).prompt_ids == [900, 1]


@pytest.mark.parametrize("name", ["a\nb", "a\rb", "\x00", "a\x7f", "a\x85b"])
@pytest.mark.parametrize("field", ["adapter_id", "adapter_source"])
def test_w2_control_characters_in_ids_are_refused(field, name):
    """LoRAX puts them in a header and ends."""
    with pytest.raises(ValidationError, match=f"`{field}` must not contain control characters"):
        validate("w1", **{field: name})


def test_w1_merged_adapters_with_control_characters_or_nonsense_are_refused():
    """An unknown merge strategy ends LoRAX's server."""
    with pytest.raises(ValidationError, match="control characters"):
        validate("w1", merged_adapters=MergedAdapters(ids=["a\n"]))
    with pytest.raises(ValidationError, match="merged_adapters"):
        validate("w1", merged_adapters=MergedAdapters(ids=["a"], merge_strategy="nonsense"))


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValidationError, match="must not be empty"):
        validate("")


def test_a_prompt_that_cannot_be_tokenized_is_refused():
    with pytest.raises(ValidationError, match="cannot be tokenized"):
        validate("w1 \ud800")


@pytest.mark.parametrize(
    "params",
    [
        {"best_of": 2, "do_sample": True},
        {"best_of": 2, "n": 1, "do_sample": True},
        {"decoder_input_details": True},
    ],
)
def test_what_streams_cannot_do(params):
    with pytest.raises(ValidationError, match="for streams"):
        validate("w1", stream=True, **params)
    validate("w1", stream=False, **params)


def test_best_of_one_may_stream():
    assert len(validate("w1", stream=True, best_of=1).samplings) == 1


def test_the_chat_template_is_applied_and_writes_the_special_tokens_itself():
    # <user> w7 <assistant>
    assert validate("w7", chat=True).prompt_ids == [902, 904, 903, 7, 902, 905, 903]


def test_a_model_without_a_template_says_so():
    with pytest.raises(TemplateError, match="no chat template"):
        validate("w7", chat=True, template=None)


def test_details_come_with_prompt_details_too():
    assert validate("w1", decoder_input_details=True).details
    assert validate("w1", decoder_input_details=True).samplings[0].prompt_logprobs


def test_biases_and_a_least_length_reach_the_shards():
    valid = validate(
        "w1", logit_bias={7: -100.0, 3: 0.1}, min_new_tokens=2, max_new_tokens=2, watermark=True
    )
    (sampling,) = valid.samplings
    # As shards compute with it: in 32 bits.
    assert sampling.logit_bias == LogitBias((7, 3), (-100.0, 0.10000000149011612))
    assert sampling.watermark
    assert valid.stopping.min_new_tokens == 2
    assert validate("w1", logit_bias=dict.fromkeys(range(300), 1.0)).samplings[0].logit_bias


def test_a_request_can_be_less_urgent_than_its_key_and_never_more():
    acme = Caller(tenant="acme", priority=3, weight=2.0)
    asked = {None: 3, 1: 3, 3: 3, 9: 9}
    for priority, granted in asked.items():
        terms = validate("w1", caller=acme, priority=priority).terms
        assert terms == RequestTerms("acme", 2.0, granted)


def test_without_keys_a_request_says_how_urgent_it_is():
    assert validate("w1").terms == RequestTerms()
    assert validate("w1", priority=-5).terms == RequestTerms(priority=-5)


@pytest.mark.parametrize("priority", [2**31, -(2**31) - 1])
def test_a_priority_beyond_32_bits_is_refused(priority):
    with pytest.raises(ValidationError, match="`priority` must be from -2147483648"):
        validate("w1", priority=priority)


def test_a_least_length_beyond_what_fits_is_refused():
    with pytest.raises(ValidationError, match="at most `max_new_tokens`, got 21, of at most 20"):
        validate(prompt(10), min_new_tokens=21)


@pytest.mark.parametrize("asked", [None, 0])
def test_a_prompt_alone_may_be_asked_for(asked):
    valid = validate(
        "w1", output=OutputKind.PROMPT, max_new_tokens=asked, decoder_input_details=True,
        num_prompt_alternatives=3,
    )  # fmt: skip
    assert valid.output is OutputKind.PROMPT
    assert valid.stopping.max_new_tokens == 0
    assert valid.samplings[0].num_prompt_alternatives == 3


def test_no_tokens_are_asked_for_by_name_only():
    with pytest.raises(ValidationError, match="`max_new_tokens` must be above 0"):
        validate("w1", max_new_tokens=0)


def test_full_text_is_prompt_and_output():
    assert validate("w1", return_full_text=True).full_text("!") == "w1!"
    assert validate("w1").full_text("!") == "!"


def test_seeds_pass_through_signed_integers():
    assert all(0 <= draw_seed() < 2**63 for _ in range(50))


def test_w30_neither_prompt_nor_token_is_part_of_a_repr():
    params = GenerateParameters(api_token="hf_secret")
    request = GenerateRequest(prompt=TextPrompt("private words"), parameters=params)
    assert "hf_secret" not in repr(request)
    assert "private" not in repr(request)
    assert "w3" not in repr(validate("w3"))
