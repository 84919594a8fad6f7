"""One question asked twice, whole and streamed, in each dialect; both answers in one form.

Streams are put together here as a client would, by nothing of the server's own code.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
import httpx
from google.protobuf.json_format import MessageToDict
from tests.acceptance.clients.checks import used

from lorax_proto import lorax_pb2 as pb
from lorax_proto.lorax_pb2_grpc import LoraxStub

Json = dict[str, Any]
BOUND_S = 300.0


@dataclass
class Choice:
    """One answer in the form that all dialects are brought to."""

    text: str = ""
    reasoning: str = ""
    # Names and arguments.
    calls: list[list[str]] = field(default_factory=list)
    # Why it ended, by what, its seed: whatever a dialect tells.
    ending: Json = field(default_factory=dict)
    # Texts of tokens where they are told.
    tokens: list[Any] = field(default_factory=list)
    logprobs: list[float | None] = field(default_factory=list)


@dataclass
class Answer:
    """All answers to one request, and what they took."""

    choices: list[Choice] = field(default_factory=list)
    usage: Any = None

    def choice(self, index: int) -> Choice:
        """Return one of the answers; begins it where it is not there."""
        while len(self.choices) <= index:
            self.choices.append(Choice())
        return self.choices[index]

    def is_like(self, other: Answer) -> bool:
        """Whether both say the same; logprobs may differ by what rounding does."""
        mine, theirs = ([each.logprobs for each in one.choices] for one in (self, other))
        numbers = [list(zip(a, b)) for a, b in zip(mine, theirs)]
        return self._facts() == other._facts() and all(
            (a is None) == (b is None) and abs((a or 0.0) - (b or 0.0)) < 1e-2
            for row in numbers
            for a, b in row
        )

    def _facts(self) -> Any:
        rows = [(c.text, c.reasoning, c.calls, c.ending, c.tokens) for c in self.choices]
        return [*rows, [len(c.logprobs) for c in self.choices], self.usage and used(self.usage)]


class Clients:
    """Connections to one server."""

    def __init__(self, url: str, address: str) -> None:
        self.http = httpx.AsyncClient(base_url=url, timeout=BOUND_S)
        self._channel = grpc.aio.insecure_channel(address)
        self.grpc = LoraxStub(self._channel)

    async def close(self) -> None:
        """Close them."""
        await self.http.aclose()
        await self._channel.close()

    async def post(self, path: str, body: Json) -> Json:
        """Return a whole answer; raises where there is none."""
        answer = await self.http.post(path, json=body)
        if answer.status_code != 200:
            raise RuntimeError(f"{path} {body}: {answer.status_code} {answer.text}")
        return dict(answer.json())

    async def events(self, path: str, body: Json) -> AsyncIterator[Json]:
        """Yield the events of a stream; raises where there is none."""
        async with self.http.stream("POST", path, json=body) as answer:
            if answer.status_code != 200:
                raise RuntimeError(f"{path} {body}: {answer.status_code} {await answer.aread()!r}")
            async for line in answer.aiter_lines():
                if line.startswith("data:") and line != "data: [DONE]":
                    yield json.loads(line[5:])


Asker = Callable[[Clients, Json], Awaitable[tuple[Answer, Answer]]]


# --- OpenAI's completions ---------------------------------------------------------


async def completions(clients: Clients, body: Json) -> tuple[Answer, Answer]:
    """Ask for completions."""
    path = "/v1/completions"
    whole, streamed = Answer(), Answer()
    document = await clients.post(path, body)
    for each in document["choices"]:
        _take_completion(whole, each)
    whole.usage = document["usage"]
    async for event in clients.events(path, _streamed(body)):
        for each in event["choices"]:
            _take_completion(streamed, each)
        streamed.usage = event.get("usage") or streamed.usage
    return whole, streamed


def _streamed(body: Json) -> Json:
    return {**body, "stream": True, "stream_options": {"include_usage": True}}


def _take_completion(answer: Answer, part: Json) -> None:
    choice = answer.choice(part["index"])
    choice.text += part["text"]
    if (columns := part["logprobs"]) is not None:
        choice.tokens += zip(columns["tokens"], columns["text_offset"])
        choice.logprobs += columns["token_logprobs"]
    _take_ending(choice, part)


def _take_ending(choice: Choice, part: Json) -> None:
    if part["finish_reason"] is not None:
        choice.ending = {name: part.get(name) for name in ("finish_reason", "stop_reason")}


# --- OpenAI's chats ---------------------------------------------------------------


async def chats(clients: Clients, body: Json) -> tuple[Answer, Answer]:
    """Ask for chat completions."""
    path = "/v1/chat/completions"
    whole, streamed = Answer(), Answer()
    document = await clients.post(path, body)
    for each in document["choices"]:
        _take_chat(whole, each, each["message"])
    whole.usage = document["usage"]
    async for event in clients.events(path, _streamed(body)):
        for each in event["choices"]:
            _take_chat(streamed, each, each["delta"])
        streamed.usage = event.get("usage") or streamed.usage
    return whole, streamed


def _take_chat(answer: Answer, part: Json, said: Json) -> None:
    choice = answer.choice(part["index"])
    choice.text += said.get("content") or ""
    choice.reasoning += said.get("reasoning_content") or ""
    for number, call in enumerate(said.get("tool_calls") or []):
        place, function = call.get("index", number), call["function"]
        if call.get("id"):
            assert place == len(choice.calls), "a call begins twice, or out of turn"
            choice.calls.append([function["name"], ""])
        choice.calls[place][1] += function["arguments"]
    if (logprobs := part["logprobs"]) is not None:
        choice.tokens += [each["token"] for each in logprobs["content"]]
        choice.logprobs += [each["logprob"] for each in logprobs["content"]]
    _take_ending(choice, part)


# --- OpenAI's Responses -----------------------------------------------------------


async def responses(clients: Clients, body: Json) -> tuple[Answer, Answer]:
    """Ask for a response."""
    path = "/v1/responses"
    whole = _of_response(await clients.post(path, body))
    streamed, last = Answer(), {}
    choice = streamed.choice(0)
    async for last in clients.events(path, {**body, "stream": True}):
        match last["type"]:
            case "response.output_text.delta":
                choice.text += last["delta"]
            case "response.reasoning_text.delta":
                choice.reasoning += last["delta"]
            case "response.output_item.added" if last["item"]["type"] == "function_call":
                choice.calls.append([last["item"]["name"], ""])
            case "response.function_call_arguments.delta":
                choice.calls[-1][1] += last["delta"]
    final = _of_response(last["response"])
    assert (choice.text, choice.calls) == (final.choices[0].text, final.choices[0].calls), last
    choice.ending, streamed.usage = final.choices[0].ending, final.usage
    return whole, streamed


def _of_response(document: Json) -> Answer:
    answer = Answer(usage=document["usage"])
    choice = answer.choice(0)
    for item in document["output"]:
        match item["type"]:
            case "message":
                choice.text += "".join(part["text"] for part in item["content"])
            case "reasoning":
                choice.reasoning += "".join(part["text"] for part in item["content"])
            case "function_call":
                choice.calls.append([item["name"], item["arguments"]])
    statuses = [item["status"] for item in document["output"]]
    choice.ending = {
        "status": [document["status"], *statuses],
        "why": document["incomplete_details"],
    }
    return answer


# --- Anthropic's messages ---------------------------------------------------------


async def messages(clients: Clients, body: Json) -> tuple[Answer, Answer]:
    """Ask for a message."""
    path = "/v1/messages"
    whole, streamed = Answer(), Answer()
    document = await clients.post(path, body)
    for block in document["content"]:
        _take_block(whole.choice(0), block)
    whole.choice(0).ending = {name: document[name] for name in ("stop_reason", "stop_sequence")}
    whole.usage = document["usage"]
    choice, partial = streamed.choice(0), ""
    async for event in clients.events(path, {**body, "stream": True}):
        match event["type"]:
            case "content_block_start":
                partial = ""
                _take_block(choice, event["content_block"])
            case "content_block_delta":
                delta = event["delta"]
                partial += delta.get("partial_json", "")
                choice.text += delta.get("text", "")
                choice.reasoning += delta.get("thinking", "")
            case "content_block_stop" if partial:
                choice.calls[-1][1] = _of_broken_off(partial)
            case "message_delta":
                choice.ending, streamed.usage = event["delta"], event["usage"]
    return whole, streamed


def _take_block(choice: Choice, block: Json) -> None:
    match block["type"]:
        case "text":
            choice.text += block["text"]
        case "thinking":
            choice.reasoning += block["thinking"]
        case "tool_use":
            choice.calls.append([block["name"], json.dumps(block["input"], sort_keys=True)])


def _of_broken_off(text: str) -> str:
    """Return arguments as the SDK of this dialect reads them, also where they were broken off."""
    from pydantic_core import from_json

    with contextlib.suppress(ValueError):
        found = from_json(text, allow_partial=True)
        return json.dumps(found if isinstance(found, dict) else {}, sort_keys=True)
    return "{}"


# --- LoRAX's and TGI's routes -----------------------------------------------------


async def lorax(clients: Clients, body: Json) -> tuple[Answer, Answer]:
    """Ask as LoRAX's and TGI's clients do."""
    document = await clients.post("/generate", body)
    return _of_lorax(document, document["details"]["tokens"]), await _lorax_stream(
        clients, "/generate_stream", body
    )


async def tgi(clients: Clients, body: Json) -> tuple[Answer, Answer]:
    """Ask at the root, which answers whole or in a stream."""
    answer = await clients.http.post("/", json={**body, "stream": False})
    (document,) = answer.raise_for_status().json()
    whole = _of_lorax(document, document["details"]["tokens"])
    return whole, await _lorax_stream(clients, "/", {**body, "stream": True})


async def _lorax_stream(clients: Clients, path: str, body: Json) -> Answer:
    tokens, last = [], {}
    async for last in clients.events(path, body):
        tokens.append(last["token"])
    return _of_lorax(last, tokens)


def _of_lorax(document: Json, tokens: list[Json]) -> Answer:
    details = document["details"]
    choice = Choice(
        text=document["generated_text"],
        ending={name: details[name] for name in ("finish_reason", "seed")},
        tokens=[[each["id"], each["text"], each["special"]] for each in tokens],
        logprobs=[each["logprob"] for each in tokens],
    )
    return Answer([choice], [details["prompt_tokens"], details["generated_tokens"]])


# --- gRPC -------------------------------------------------------------------------


async def grpc_generate(clients: Clients, body: Json) -> tuple[Answer, Answer]:
    """Ask Generate and GenerateStream."""
    request = pb.GenerateRequest(**body)
    document = await clients.grpc.Generate(request, timeout=BOUND_S)
    whole, streamed = Answer(usage=MessageToDict(document.usage)), Answer()
    for index, each in enumerate(document.sequences):
        _take_message(whole.choice(index), each, each.text)
    async for chunk in clients.grpc.GenerateStream(request, timeout=BOUND_S):
        _take_message(streamed.choice(chunk.sequence), chunk, chunk.text)
        streamed.usage = MessageToDict(chunk.usage)
    return whole, streamed


async def grpc_chat(clients: Clients, body: Json) -> tuple[Answer, Answer]:
    """Ask Chat and ChatStream."""
    request = pb.ChatRequest(**body)
    document = await clients.grpc.Chat(request, timeout=BOUND_S)
    whole, streamed = Answer(usage=MessageToDict(document.usage)), Answer()
    for index, each in enumerate(document.choices):
        choice = whole.choice(index)
        _take_message(choice, each, each.message.content)
        choice.reasoning = each.message.reasoning_content
        choice.calls = [[call.name, call.arguments] for call in each.message.tool_calls]
    async for chunk in clients.grpc.ChatStream(request, timeout=BOUND_S):
        choice = streamed.choice(chunk.choice)
        _take_message(choice, chunk, chunk.content)
        choice.reasoning += chunk.reasoning_content
        for delta in chunk.tool_calls:
            if delta.id:
                assert delta.index == len(choice.calls), "a call begins twice, or out of turn"
                choice.calls.append([delta.name, ""])
            choice.calls[delta.index][1] += delta.arguments
        streamed.usage = MessageToDict(chunk.usage)
    return whole, streamed


def _take_message(choice: Choice, part: Any, text: str) -> None:
    choice.text += text
    choice.tokens += [[each.id, each.text, each.special] for each in part.tokens]
    choice.logprobs += [each.logprob for each in part.tokens]
    if part.finish_reason:
        seed = part.seed if part.HasField("seed") else None
        choice.ending = {"why": part.finish_reason, "by": str(part.stopped_by), "seed": seed}
