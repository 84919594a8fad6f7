"""`/v1/completions`: prompts of all kinds, echo, logprobs, streams that add up."""

from __future__ import annotations

import pytest
from tests.helpers.in_loop import in_loop
from tests.helpers.openai_world import Session

from lorax_contract.step import FinishCode, OutputKind

PATH = "/v1/completions"


@in_loop
async def test_a_completion_has_what_sdks_read():
    session = Session()
    session.says("a", " b")
    document = await session.complete(model="tests/tiny", max_tokens=5)
    assert document["id"].startswith("cmpl-")
    assert document["object"] == "text_completion"
    assert document["model"] == "tests/tiny"
    assert isinstance(document["created"], int)
    assert document["choices"] == [
        {"index": 0, "text": "a b", "logprobs": None, "finish_reason": "stop", "stop_reason": None}
    ]
    # "w1 w2" has three tokens with the one that begins a text.
    assert document["usage"] == {
        "prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6,
        "prompt_tokens_details": {"cached_tokens": 0},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        ("w1 w2", [[900, 1, 2]]),
        (["w1", "w2"], [[900, 1], [900, 2]]),
        ([5, 6], [[5, 6]]),
        ([[5, 6], [7]], [[5, 6], [7]]),
    ],
)
def test_a_prompt_is_a_text_or_ids_or_several(prompt, ids):
    @in_loop
    async def scene():
        session = Session()
        document = await session.complete(prompt=prompt, max_tokens=1)
        submitted = [list(spec.prompt_ids) for spec in session.world.engine.submitted]
        assert sorted(submitted) == sorted(ids)
        assert [each["index"] for each in document["choices"]] == list(range(len(ids)))
        assert document["usage"]["prompt_tokens"] == sum(map(len, ids))

    scene()


@in_loop
async def test_choices_are_counted_through_all_prompts():
    session = Session()
    document = await session.complete(prompt=["w1", "w2"], n=2, max_tokens=1)
    assert [each["index"] for each in document["choices"]] == [0, 1, 2, 3]
    prompts = [tuple(spec.prompt_ids) for spec in session.world.engine.submitted]
    # Prompts are tokenized side by side; answers come in their order all the same.
    assert sorted(prompts) == [(900, 1), (900, 1), (900, 2), (900, 2)]


@in_loop
async def test_defaults_are_those_of_openai():
    session = Session()
    await session.complete()
    (spec,) = session.world.engine.submitted
    assert spec.stopping.max_new_tokens == 16
    assert (spec.sampling.do_sample, spec.sampling.temperature) == (True, 1.0)
    await session.complete(temperature=0)
    assert not session.world.engine.submitted[1].sampling.do_sample


@in_loop
async def test_fields_reach_the_engine():
    session = Session()
    await session.complete(
        max_tokens=3, temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, typical_p=0.8, seed=4,
        repetition_penalty=1.5, frequency_penalty=0.5, presence_penalty=-0.5, stop="x", n=2,
        stop_token_ids=[9], ignore_eos=True, min_tokens=2, logit_bias={"5": -100, "6": 1.5},
    )  # fmt: skip
    first, second = session.world.engine.submitted
    sampling, stopping = first.sampling, first.stopping
    assert (sampling.temperature, sampling.top_k, sampling.seed) == (0.5, 7, 4)
    assert (sampling.top_p, sampling.min_p, sampling.typical_p) == pytest.approx((0.9, 0.1, 0.8))
    assert sampling.repetition_penalty == 1.5
    assert (sampling.frequency_penalty, sampling.presence_penalty) == (0.5, -0.5)
    assert (sampling.logit_bias.ids, sampling.logit_bias.values) == ((5, 6), (-100.0, 1.5))
    assert (stopping.stop_sequences, stopping.stop_token_ids) == (("x",), (9,))
    assert (stopping.ignore_eos, stopping.min_new_tokens) == (True, 2)
    assert second.sampling.seed != 4


@pytest.mark.parametrize("value", [0, -1])
def test_no_top_k_is_said_in_two_ways(value):
    @in_loop
    async def scene():
        session = Session()
        await session.complete(top_k=value, typical_p=1.0, max_tokens=1)
        (spec,) = session.world.engine.submitted
        assert (spec.sampling.top_k, spec.sampling.typical_p) == (0, 1.0)

    scene()


@in_loop
async def test_a_stop_sequence_is_no_part_of_the_text_and_is_named():
    session = Session()
    session.says("a", "bEN", "D", finish=FinishCode.STOP_SEQUENCE)
    document = await session.complete(stop=["END"])
    (choice,) = document["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("ab", "stop")
    assert choice["stop_reason"] == "END"
    parts = await session.stream(PATH, prompt="w1", stop=["END"])
    assert [each["choices"][0]["text"] for each in parts] == ["a", "b", ""]
    whole = await session.complete(stop=["END"], include_stop_str_in_output=True)
    assert whole["choices"][0]["text"] == "abEND"


@in_loop
async def test_logprobs_stand_in_columns():
    session = Session()
    session.says("a", " b", finish=FinishCode.LENGTH)
    document = await session.complete(logprobs=2)
    assert document["choices"][0]["logprobs"] == {
        "tokens": ["a", " b"],
        "token_logprobs": [-0.25, -0.25],
        "top_logprobs": [{"a": -0.25, "other": -2.0}, {" b": -0.25, "other": -2.0}],
        "text_offset": [0, 1],
    }
    (spec,) = session.world.engine.submitted
    assert spec.sampling.num_alternatives == 2
    parts = await session.stream(PATH, prompt="w1", logprobs=0)
    assert [each["choices"][0]["logprobs"]["text_offset"] for each in parts] == [[0], [1]]


@in_loop
async def test_an_echo_puts_the_prompt_in_front_with_its_logprobs():
    session = Session()
    document = await session.complete(prompt="w1 w2", echo=True, logprobs=1, max_tokens=1)
    (choice,) = document["choices"]
    assert choice["text"] == "w1 w2 w0"
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == ["p", "p", "p", " w0"]
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["token_logprobs"][1:] == [-1.0, -1.0, -0.5]
    of_ids = await session.complete(prompt=[1, 2], echo=True, max_tokens=1)
    assert of_ids["choices"][0]["text"] == "pp w0"


@in_loop
async def test_a_streamed_echo_begins_with_the_prompt():
    session = Session()
    whole = await session.complete(prompt="w1 w2", echo=True, logprobs=0, max_tokens=2)
    body = {"prompt": "w1 w2", "echo": True, "logprobs": 0, "max_tokens": 2}
    parts = [each["choices"][0] for each in await session.stream(PATH, **body)]
    assert "".join(each["text"] for each in parts) == whole["choices"][0]["text"]
    streamed = [token for each in parts for token in each["logprobs"]["tokens"]]
    assert streamed == whole["choices"][0]["logprobs"]["tokens"]


@in_loop
async def test_an_echo_without_output_computes_the_prompt_only():
    session = Session()
    answer = await session.post(PATH, prompt="w1", echo=True, max_tokens=0)
    assert session.world.engine.submitted[0].output is OutputKind.PROMPT, answer.text
    refused = await session.post(PATH, prompt="w1", max_tokens=0)
    assert refused.status_code == 400
    assert "`max_tokens` must be above 0" in refused.json()["error"]["message"]


@in_loop
async def test_a_stream_adds_up_to_the_answer_and_tells_its_usage():
    session = Session()
    session.says("a", " b", "c")
    whole = await session.complete(prompt=["w1", "w2"])
    parts = await session.stream(PATH, prompt=["w1", "w2"], stream_options={"include_usage": True})
    *parts, last = parts
    assert last["choices"] == []
    assert last["usage"] == whole["usage"]
    assert len({each["id"] for each in parts}) == 1
    for number in range(2):
        mine = [p["choices"][0] for p in parts if p["choices"][0]["index"] == number]
        assert "".join(each["text"] for each in mine) == whole["choices"][number]["text"]
        assert [each["finish_reason"] for each in mine] == [None] * (len(mine) - 1) + ["stop"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"suffix": "x"}, "suffix"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [906]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"n": 0}, "n"),
        ({"n": 500}, "n"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": 100}, "prompt"),
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"logprobs": 21}, "logprobs"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"bad_words": ["x"]}, "bad_words"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_wrong_is_refused_by_name(fields, param, stream):
    @in_loop
    async def scene():
        session = Session()
        body = {"prompt": "w1", **fields}
        if stream and param != "stream_options":
            body["stream"] = True
        answer = await session.post(PATH, **body)
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert error["type"] == "invalid_request_error"
        assert error["param"].startswith(param), error
        assert session.world.engine.submitted == []

    scene()


@pytest.mark.parametrize("fields", [{"suffix": None}, {"best_of": 1}, {"use_beam_search": False},
                                    {"user": "me"}, {"length_penalty": 1.0}])  # fmt: skip
def test_what_changes_nothing_is_taken(fields):
    @in_loop
    async def scene():
        await Session().complete(**fields)

    scene()
