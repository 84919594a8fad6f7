"""Bodies of every route that reads one, to a router over a fake shard."""

from __future__ import annotations

import contextlib
import copy
import json
import random
from collections.abc import Mapping
from typing import Any

import httpx
from tests.fuzz.targets.mutate import DOCUMENT_MUTATORS, ODD, TEXT_MUTATORS, dumped
from tests.fuzz.targets.target import Case, FoundFaultError, LoopTarget, Mutator, require
from tests.helpers.adapter_world import AdapterWorld, adapter_world
from tests.helpers.asking import fields_of_all
from tests.helpers.dialects import EXAMPLES, events_of, fault_of
from tests.helpers.http_app import TEMPLATE

# Where adapters are managed: those routes are the operator's.
_ADMIN = ("/v1/adapters/", "/v1/load_lora_adapter", "/v1/unload_lora_adapter")
# What the others take must be loaded, or is no model's that is served here.
_SERVED = sorted(
    path
    for path in EXAMPLES
    if not path.endswith(("/unload", "pin", "/reload", "load_lora_adapter", "/embed_sparse"))
)
# What a field of a kind that many routes have is sent that makes sense.
_LIKELY: Mapping[str, tuple[Any, ...]] = {
    "messages": (
        [{"role": "user", "content": [{"type": "text", "text": "w1"}]}],
        [{"role": "system", "content": "w2"}, {"role": "user", "content": "w1"}],
        [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}],
        [{"role": "user", "content": "w1"},
         {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
         {"role": "tool", "tool_call_id": "1", "content": "w3"}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}],
    ),
    "tools": (
        [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}}],
        [{"name": "f", "input_schema": {"type": "object"}}],
        [{"type": "function", "name": "f", "parameters": {"type": "object"}}],
    ),
    "tool_choice": ("auto", "none", "required", {"type": "function", "function": {"name": "f"}}, {"type": "tool", "name": "f"}),
    "response_format": (
        {"type": "json_object"}, {"type": "text"},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object", "properties": {"a": {"enum": [1]}}}}},
        {"type": "regex", "value": "[ab]{2}"},
    ),
    "stop": ("w2", ["w2", "w3"], [""], ["a"] * 9),
    "stream": (True, False), "n": (1, 2, 3), "best_of": (2,), "echo": (True,), "logprobs": (True, 3), "top_logprobs": (2,),
    "max_tokens": (1, 5, 10_000), "temperature": (0, 0.7, 2), "seed": (1, 2**64), "logit_bias": ({"1": 5}, {"x": 1}),
    "prompt": ("w1", ["w1", "w2"], [1, 2], [[1], [2, 3]]), "input": ("w1", [{"role": "user", "content": "w1"}]),
    "adapter_id": ("x", "../x", "__base_model__"), "model": ("fake", "x", "nobody"), "guided_regex": ("[ab]+",),
}  # fmt: skip
_HEADS: Mapping[str, tuple[str, ...]] = {
    "content-type": ("application/json; charset=utf-8", "text/plain", "", "application/json;charset=utf-16", "multipart/form-data"),
    "authorization": ("Bearer x", "Bearer", "Basic eDp5", "Bearer  ", "x" * 3_000),
    "x-request-id": ("mine", "a b", "x" * 500), "traceparent": ("00-0-0-0", "00-" + "a" * 32 + "-" + "b" * 16 + "-01"),
    "x-timeout": ("0", "-1", "nan", "1e999", "5"), "content-encoding": ("gzip", "identity"), "accept": ("text/event-stream",),
    "anthropic-version": ("2023-06-01", "x"), "grpc-timeout": ("1S",), "expect": ("x",),
}  # fmt: skip


class HttpBodies(LoopTarget):
    """A content is a path, a document (or its bytes) and heads."""

    name = "http"
    num_per_opening = 400

    def __init__(self) -> None:
        self.fields: dict[str, tuple[str, ...]] = {}
        self.mutators = {name: _of_body(each) for name, each in DOCUMENT_MUTATORS.items()} | {
            "likely_field": self._likely_field, "odd_field": self._odd_field, "streamed": _streamed,
            "head": _head, "route": _route,
        }  # fmt: skip
        self.raw_mutators = {name: _of_body(each) for name, each in TEXT_MUTATORS.items()}

    def plain(self, draw: random.Random) -> Any:
        """Return what a route takes."""
        path = draw.choice(_SERVED)
        return path, copy.deepcopy(EXAMPLES[path]), {"content-type": "application/json"}

    def written(self, content: Any) -> Any:
        """Return the same with the body as bytes."""
        path, body, heads = content
        return path, dumped(body), heads

    async def opened(self, stack: contextlib.AsyncExitStack) -> None:
        """Start a router."""
        self._world: AdapterWorld = await stack.enter_async_context(
            adapter_world(template=TEMPLATE, default_adapter_source="local")
        )
        self.fields = await fields_of_all(self._world)

    async def judged(self, case: Case) -> str:
        """No answer may be a fault of the server's, or say nothing."""
        path, raw, heads = case.content
        client = self._world.admin if path.startswith(_ADMIN) else self._world.client
        try:
            answer = await client.post(path, content=raw, headers=heads)
        except (UnicodeError, httpx.InvalidURL):
            return "cannot be sent"
        outcome = _told(path, answer)
        alive = await self._world.client.post("/generate", json=EXAMPLES["/generate"])
        require(alive.status_code == 200, f"nobody is served after it: {alive.text[:300]}")
        return outcome

    def _likely_field(self, draw: random.Random, content: Any) -> Any:
        path, body, heads = content
        name = draw.choice(sorted(_LIKELY))
        return path, {**body, name: draw.choice(_LIKELY[name])}, heads

    def _odd_field(self, draw: random.Random, content: Any) -> Any:
        path, body, heads = content
        name = draw.choice(self.fields.get(path) or sorted(_LIKELY))
        value = draw.choice(ODD)
        if isinstance(inner := body.get("parameters"), dict) and draw.random() < 0.7:
            name = draw.choice(_PARAMETERS)
            return path, {**body, "parameters": {**inner, name: value}}, heads
        return path, {**body, name: value}, heads


def _parameters() -> list[str]:
    from lorax_router.http_api.lorax.bodies import ParametersBody

    return sorted(field.alias or name for name, field in ParametersBody.model_fields.items())


_PARAMETERS = _parameters()


def _of_body(mutator: Mutator) -> Mutator:
    def change(draw: random.Random, content: Any) -> Any:
        path, body, heads = content
        return path, mutator(draw, body), heads

    return change


def _streamed(draw: random.Random, content: Any) -> Any:
    path, body, heads = content
    if path == "/generate":
        return "/generate_stream", body, heads
    return path, {**body, "stream": True} if isinstance(body, dict) else body, heads


def _route(draw: random.Random, content: Any) -> Any:
    """The same to another route, or what that one takes."""
    _, body, heads = content
    path = draw.choice(sorted(EXAMPLES))
    return path, copy.deepcopy(draw.choice([EXAMPLES[path], body])), heads


def _head(draw: random.Random, content: Any) -> Any:
    path, body, heads = content
    name = draw.choice(sorted(_HEADS))
    return path, body, {**heads, name: draw.choice(_HEADS[name])}


def _told(path: str, answer: httpx.Response) -> str:
    status = answer.status_code
    require(status < 500 or status == 503, f"{status}: {answer.text[:500]}")
    if status != 200:
        try:
            fault_of(path, answer)
        except (AssertionError, ValueError, KeyError) as error:
            raise FoundFaultError(f"{status} in no known envelope: {answer.text[:500]}") from error
        return "refused"
    if answer.headers["content-type"] == "text/event-stream":
        for event in events_of(answer):
            require("internal" not in str(event.get("error_type", "")), f"in a stream: {event}")
        return "taken"
    if answer.headers["content-type"] == "application/json":
        json.loads(answer.content)
    return "taken"
