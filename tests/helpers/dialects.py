"""The HTTP dialects as tests speak them: where, a request that works, and how each says no."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from lorax_router.http_api.lorax.bodies import ParametersBody

MODEL = "fake"
# An error's text stays a text that people read, whatever the request was.
LONGEST_TEXT = 2_000


@dataclass(frozen=True, slots=True)
class Fault:
    """What a client is told."""

    status: int
    text: str
    # The field that is at fault, where the envelope has a place for it.
    param: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Dialect:
    """One route that generates, and its way to stream."""

    name: str
    path: str
    body: Mapping[str, Any]
    fault: Callable[[httpx.Response], Fault]
    # Of values that are at fault.
    refused: int = 400
    # Where a stream is asked for; None: by `stream` in the body.
    stream_path: str | None = None

    def asked(self, fields: Mapping[str, Any], *, stream: bool) -> tuple[str, dict[str, Any]]:
        """Return path and body of a request with these fields."""
        body = {**self.body, **fields}
        if not stream:
            return self.path, body
        if self.stream_path is not None:
            return self.stream_path, body
        return self.path, {**body, "stream": True}


def lorax_fault(answer: httpx.Response) -> Fault:
    """Read LoRAX's envelope."""
    document = answer.json()
    assert set(document) == {"error", "error_type"}, document
    assert document["error_type"]
    return Fault(answer.status_code, document["error"])


def openai_fault(answer: httpx.Response) -> Fault:
    """Read OpenAI's envelope."""
    document = answer.json()
    assert set(document) == {"error"}, document
    error = document["error"]
    assert set(error) == {"message", "type", "param", "code"}, document
    assert error["type"]
    return Fault(answer.status_code, error["message"], error["param"])


def anthropic_fault(answer: httpx.Response) -> Fault:
    """Read Anthropic's envelope."""
    document = answer.json()
    assert set(document) == {"type", "error", "request_id"}, document
    assert document["type"] == "error"
    assert set(document["error"]) == {"type", "message"}, document
    assert answer.headers["request-id"] == document["request_id"]
    return Fault(answer.status_code, document["error"]["message"])


def fault_of(path: str, answer: httpx.Response) -> Fault:
    """Read the envelope of the dialect that a path is of."""
    assert answer.headers["content-type"] == "application/json"
    if path.startswith("/v1/messages"):
        fault = anthropic_fault(answer)
    elif path.startswith("/v1/") and not path.startswith("/v1/adapters"):
        fault = openai_fault(answer)
    else:
        fault = lorax_fault(answer)
    assert 0 < len(fault.text) <= LONGEST_TEXT, fault.text[:300]
    return fault


def events_of(answer: httpx.Response) -> list[Any]:
    """The data of all events of a stream, but for the word that ends some."""
    lines = [line[5:].strip() for line in answer.text.split("\n") if line.startswith("data:")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


_SAID = [{"role": "user", "content": "w1"}]
LORAX = Dialect(
    name="lorax", path="/generate", stream_path="/generate_stream", refused=422, fault=lorax_fault,
    body={"inputs": "w1", "parameters": {"max_new_tokens": 2}},
)  # fmt: skip
TGI = Dialect(
    name="tgi", path="/", refused=422, fault=lorax_fault,
    body={"inputs": "w1", "parameters": {"max_new_tokens": 2}},
)  # fmt: skip
COMPLETIONS = Dialect(
    name="completions", path="/v1/completions", fault=openai_fault,
    body={"model": MODEL, "prompt": "w1", "max_tokens": 2},
)  # fmt: skip
CHAT = Dialect(
    name="chat", path="/v1/chat/completions", fault=openai_fault,
    body={"model": MODEL, "messages": _SAID, "max_tokens": 2},
)  # fmt: skip
RESPONSES = Dialect(
    name="responses", path="/v1/responses", fault=openai_fault,
    body={"model": MODEL, "input": "w1", "max_output_tokens": 2},
)  # fmt: skip
MESSAGES = Dialect(
    name="messages", path="/v1/messages", fault=anthropic_fault,
    body={"model": MODEL, "messages": _SAID, "max_tokens": 2},
)  # fmt: skip
DIALECTS = (LORAX, TGI, COMPLETIONS, CHAT, RESPONSES, MESSAGES)

LORAX_FIELDS = tuple(field.alias or name for name, field in ParametersBody.model_fields.items())
# A body that works for every route that reads one.
EXAMPLES: dict[str, dict[str, Any]] = {
    **{dialect.path: dict(dialect.body) for dialect in DIALECTS},
    "/generate_stream": dict(LORAX.body),
    "/invocations": dict(LORAX.body),
    "/embed": {"inputs": "w1", "parameters": {}},
    "/v1/embeddings": {"model": MODEL, "input": "w1"},
    "/classify": {"inputs": "w1", "parameters": {"adapter_id": "judge"}},
    "/classify_batch": {"inputs": ["w1", "w2"], "parameters": {"adapter_id": "tagger"}},
    "/predict": {"inputs": [["w1", "w2"]], "adapter_id": "judge"},
    "/rerank": {"query": "w1", "texts": ["w2", "w3"]},
    "/v1/rerank": {"model": MODEL, "query": "w1", "documents": ["w2", {"text": "w3"}]},
    "/v2/rerank": {"model": "ranker", "query": "w1", "documents": ["w2"]},
    "/score": {"text_1": "w1", "text_2": ["w2", "w3"]},
    "/v1/score": {"model": MODEL, "text_1": ["w1", "w2"], "text_2": ["w2", "w3"]},
    "/tokenize": {"inputs": "w1"},
    "/detokenize": {"tokens": [1]},
    "/decode": {"ids": [1]},
    "/embed_all": {"inputs": "w1"},
    "/embed_sparse": {"inputs": "w1"},
    "/embeddings": {"model": MODEL, "input": "w1"},
    "/similarity": {"inputs": {"source_sentence": "w1", "sentences": ["w2", "w3"]}},
    "/v1/messages/count_tokens": {"model": "fake", "messages": [{"role": "user", "content": "w1"}]},
    "/v1/load_lora_adapter": {"lora_name": "mine", "lora_path": "x"},
    "/v1/unload_lora_adapter": {"lora_name": "mine"},
    **{f"/v1/adapters/{verb}": {"adapter_id": "x", "adapter_source": "local"}
       for verb in ("load", "unload", "pin", "unpin", "reload")},
}  # fmt: skip
