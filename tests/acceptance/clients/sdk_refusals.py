"""What bad input raises in OpenAI's and Anthropic's SDKs: ``python sdk_refusals.py URL MODEL ADAPTER``.

The server asks for the key below.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import anthropic
import openai

KEY = "sk-of-clients"
SAID = [{"role": "user", "content": "hi"}]
ENDLESS = {
    "type": "object",
    "properties": {"a": {"$ref": "#"}},
    "required": ["a"],
    "additionalProperties": False,
}
PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
OWN_PICTURE = {
    "type": "image",
    "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"},
}
HUGE = [{"type": "function", "function": {"name": f"f{n}"}, "x": "y" * 500} for n in range(20_000)]
Fault = tuple[str, dict[str, Any], type[Exception]]


def check(name: str, found: object) -> None:
    """Say what was checked; raises if it is not so."""
    if not found:
        raise SystemExit(f"not ok: {name}")
    print(f"ok: {name}")


def raises(name: str, kind: type[Exception], call: Callable[[], object]) -> None:
    """Check that a call raises just this class, with words."""
    try:
        # A stream's error may come when it is read.
        found = call()
        if isinstance(found, (openai.Stream, anthropic.Stream)):
            list(found)
    except Exception as error:
        check(f"{name}: {kind.__name__}, got {type(error).__name__}", type(error) is kind)
        check(f"{name}: in words", len(str(error)) > 20)
    else:
        check(f"{name}: nothing was raised", False)


def chats(bad: type[Exception], absent: type[Exception], large: type[Exception]) -> Iterator[Fault]:
    """Faults of OpenAI's chats."""
    for value in ([], [{"role": "wizard", "content": "x"}], [{"role": "user"}], "x", [5],
                  [{"role": "user", "content": [PICTURE]}]):  # fmt: skip
        yield f"messages {str(value)[:40]}", {"messages": value}, bad
    for value in (0, -1, 10**9, "x", 1.5):
        yield f"max_tokens {value}", {"max_tokens": value}, bad
    yield "n", {"n": 100, "max_tokens": 10**6}, bad
    yield "n of none", {"n": 0}, bad
    for value in ([{"type": "function", "function": {}}], "x", HUGE[:200]):
        yield f"tools {str(value)[:40]}", {"tools": value}, bad
    endless = {"name": "f", "parameters": ENDLESS, "strict": True}
    yield "an endless tool", {
        "tools": [{"type": "function", "function": endless}], "tool_choice": "required",
    }, bad  # fmt: skip
    yield "an endless schema", {
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": ENDLESS}}
    }, bad  # fmt: skip
    yield "a field of others", {"extra_body": {"chat_template": "x"}}, bad
    yield "a model that is none", {"model": "local:no-such-folder"}, absent
    yield "10 MB of tools", {"tools": HUGE}, large


def messages(
    bad: type[Exception], absent: type[Exception], large: type[Exception]
) -> Iterator[Fault]:
    """Faults of Anthropic's messages."""
    for value in ([], [{"role": "wizard", "content": "x"}], [{"role": "user", "content": ""}],
                  [{"role": "user", "content": [OWN_PICTURE]}]):  # fmt: skip
        yield f"messages {str(value)[:40]}", {"messages": value}, bad
    # More would be refused by the SDK itself, which wants a stream then.
    for number in (0, -1, 9_000):
        yield f"max_tokens {number}", {"max_tokens": number}, bad
    own: list[Any] = [{"name": "", "input_schema": {}}]
    yield "a tool without a name", {"tools": own}, bad
    own = [{"name": "f", "input_schema": ENDLESS}]
    yield "an endless tool", {"tools": own, "tool_choice": {"type": "any"}}, bad
    yield "a field of others", {"extra_body": {"stop": ["x"]}}, bad
    yield "a model that is none", {"model": "local:no-such-folder"}, absent
    yield "10 MB of tools", {"tools": HUGE}, large


def openai_sdk(url: str, model: str) -> None:
    """Each fault by its class, whole and streamed."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)
    # The SDK has no class of its own for a 413.
    kinds = (openai.BadRequestError, openai.NotFoundError, openai.APIStatusError)
    for (name, fields, kind), stream in itertools.product(chats(*kinds), (False, True)):
        wanted = {"model": model, "messages": SAID, "max_tokens": 2, "stream": stream, **fields}
        raises(f"openai, {name}, {stream=}", kind,
               lambda asked=wanted: client.chat.completions.create(**asked))  # fmt: skip
    for fields in ({"prompt": ""}, {"prompt": []}, {"max_tokens": 0}, {"suffix": "x"},
                   {"logit_bias": {"x": 1}}):  # fmt: skip
        completion = {"model": model, "prompt": "hi", **fields}
        raises(f"openai, completion {fields}", openai.BadRequestError,
               lambda asked=completion: client.completions.create(**asked))  # fmt: skip
    for fields in ({"input": []}, {"max_output_tokens": 0}, {"store": True},
                   {"tools": [{"type": "function", "name": ""}]}):  # fmt: skip
        response = {"model": model, "input": "hi", **fields}
        raises(f"openai, response {fields}", openai.BadRequestError,
               lambda asked=response: client.responses.create(**asked))  # fmt: skip
    echoed = client.completions.create(
        model=model, prompt="hi there", max_tokens=0, echo=True, logprobs=0
    )
    check("openai, max_tokens 0 with echo", echoed.choices[0].text == "hi there")
    stranger = openai.OpenAI(base_url=f"{url}/v1", api_key="sk-of-nobody", max_retries=0)
    for call in (stranger.models.list,
                 lambda: stranger.chat.completions.create(model=model, messages=SAID),
                 lambda: stranger.chat.completions.create(model=model, messages=SAID, stream=True)):  # fmt: skip
        raises("openai, a wrong key", openai.AuthenticationError, call)
    raises("openai, what takes an admin", openai.PermissionDeniedError,
           lambda: client.post("/load_lora_adapter", cast_to=object, body={"lora_name": "x"}))  # fmt: skip


def anthropic_sdk(url: str, model: str, adapter: str) -> None:
    """The same of Anthropic's."""
    client = anthropic.Anthropic(base_url=url, api_key=KEY, max_retries=0)
    kinds = (anthropic.BadRequestError, anthropic.NotFoundError, anthropic.RequestTooLargeError)
    for (name, fields, kind), stream in itertools.product(messages(*kinds), (False, True)):
        wanted = {"model": model, "messages": SAID, "max_tokens": 2, "stream": stream, **fields}
        raises(f"anthropic, {name}, {stream=}", kind,
               lambda asked=wanted: client.messages.create(**asked))  # fmt: skip
    raises("anthropic, counting", anthropic.BadRequestError,
           lambda: client.messages.count_tokens(model=model, messages=[]))  # fmt: skip
    stranger = anthropic.Anthropic(base_url=url, api_key="sk-of-nobody", max_retries=0)
    for call in (stranger.models.list,
                 lambda: stranger.messages.create(model=model, messages=SAID, max_tokens=2)):  # fmt: skip
        raises("anthropic, a wrong key", anthropic.AuthenticationError, call)
    listed = list(client.models.list(limit=1))
    check("anthropic, models page by page", {model, adapter} <= {each.id for each in listed})
    found = client.models.retrieve(adapter)
    check("anthropic, a model", found.id == found.display_name == adapter)
    check("anthropic, its time", found.created_at.year >= 2024 and found.lifecycle == "active")
    raises("anthropic, no such model", anthropic.NotFoundError,
           lambda: client.models.retrieve("no/such"))  # fmt: skip


def main() -> None:
    """Run all checks."""
    url, model, adapter = sys.argv[1:]
    openai_sdk(url, model)
    anthropic_sdk(url, model, adapter)


if __name__ == "__main__":
    main()
