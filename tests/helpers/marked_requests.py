"""Requests whose every text has a mark that no log may show: all dialects, good ones and bad."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import grpc
import httpx

from lorax_proto import lorax_pb2 as pb
from lorax_proto.lorax_pb2_grpc import LoraxStub

MARK = "zqxmarkzqx"
# Of a secret that requests bring.
TOKEN = f"hf_{MARK}token"
_USER = {"role": "user", "content": f"Say {MARK}"}
_SCHEMA = {"type": "object", "properties": {MARK: {"const": MARK}}, "required": [MARK]}
_BAD_SCHEMAS: tuple[Any, ...] = (
    {"type": MARK}, {"$ref": f"#/{MARK}"}, {"type": "string", "pattern": f"({MARK}"},
    {"type": "object", "properties": {MARK: {"$ref": "#"}}, "required": [MARK]},
)  # fmt: skip


def http_requests(model: str) -> Iterator[tuple[str, Any]]:
    """Yield paths with bodies, or with bytes that are none."""
    for path, body in _whole(model):
        yield path, body
        if not path.startswith(("/tokenize", "/v1/messages/count")):
            yield path, {**body, "stream": True}
    for path in ("/generate", "/v1/chat/completions", "/v1/messages", "/v1/adapters/load"):
        yield path, f'{{"inputs": "{MARK}'.encode()
        yield path, f'{{"{MARK}": 5, "messages": "{MARK}", "inputs": ["{MARK}"]}}'.encode()
        yield path, json.dumps({"inputs": MARK * 300_000}).encode()


def _whole(model: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for fields in (
        {}, {"stop": [MARK], "details": True}, {"max_new_tokens": 0}, {"max_new_tokens": 10**6},
        {"apply_chat_template": True}, {"api_token": TOKEN}, {"truncate": 0},
        {"adapter_id": "no-such-folder", "adapter_source": "local", "api_token": TOKEN},
        {"decoder_input_details": True}, {"response_format": {"type": MARK}},
        {"grammar": {"type": "regex", "value": f"({MARK}"}},
        {"response_format": {"type": "json_object", "schema": _SCHEMA}, "max_new_tokens": 60},
        *({"response_format": {"type": "json_object", "schema": each}} for each in _BAD_SCHEMAS),
    ):  # fmt: skip
        yield "/generate", {"inputs": f"Say {MARK}", "parameters": {"max_new_tokens": 2, **fields}}
    yield "/generate_stream", {"inputs": MARK, "parameters": {"max_new_tokens": 3}}
    yield "/tokenize", {"inputs": MARK}
    yield "/tokenize", {"inputs": [MARK], "prompt_name": MARK}
    yield "/tokenize", {"messages": [{"role": MARK, "content": MARK}]}
    for fields in (
        {}, {"echo": True, "logprobs": 1, "max_tokens": 0}, {"suffix": MARK}, {"stop": MARK},
        {"guided_choice": [MARK, f"{MARK}2"], "max_tokens": 20}, {"guided_regex": f"[{MARK}"},
        {"guided_grammar": f"start: {MARK}"}, {"structured_outputs": {MARK: 1}}, {"user": MARK},
        {"prompt": "", "user": MARK}, {"logit_bias": {MARK: 1}},
    ):  # fmt: skip
        yield "/v1/completions", {"model": model, "prompt": MARK, "max_tokens": 2, **fields}
    chat = {"model": model, "messages": [_USER], "max_tokens": 2}
    tool = {"type": "function", "function": {"name": MARK, "parameters": _SCHEMA}}
    for fields in (
        {}, {"tools": [tool]}, {"tools": [tool], "tool_choice": "required", "max_tokens": 40},
        {"tools": [tool, tool]}, {"tool_choice": MARK}, {"chat_template_kwargs": {MARK: MARK}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": _SCHEMA}}},
        *({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": each}}}
          for each in _BAD_SCHEMAS),
        {"messages": [{"role": MARK, "content": MARK}]}, {"messages": MARK},
        {"messages": [{"role": "user", "content": [{"type": MARK, "text": MARK}]}]},
        {"messages": [_USER, {"role": "assistant", "content": MARK}], "continue_final_message": True},
        {"chat_template": MARK}, {"metadata": {MARK: MARK}}, {MARK: MARK},
    ):  # fmt: skip
        yield "/v1/chat/completions", {**chat, **fields}
    for fields in (
        {}, {"instructions": MARK, "metadata": {MARK: MARK}}, {"input": [_USER]},
        {"tools": [{"type": MARK, "name": MARK}]}, {"input": [{"type": MARK}]}, {"include": [MARK]},
        {"text": {"format": {"type": "json_schema", "name": MARK, "schema": _BAD_SCHEMAS[0]}}},
    ):  # fmt: skip
        yield "/v1/responses", {"model": model, "input": MARK, "max_output_tokens": 2, **fields}
    message = {"model": model, "messages": [_USER], "max_tokens": 2}
    for fields in (
        {}, {"system": MARK}, {"stop_sequences": [MARK]}, {"max_tokens": 0},
        {"messages": [{"role": MARK, "content": MARK}]}, {"system": [{"type": MARK}]},
        {"tools": [{"name": MARK, "input_schema": _SCHEMA}], "tool_choice": {"type": "any"},
         "max_tokens": 40},
        {"tool_choice": {"type": MARK}}, {"metadata": {"user_id": MARK}},
    ):  # fmt: skip
        yield "/v1/messages", {**message, **fields}
    for fields in (
        {},
        {"input": [MARK, ""]},
        {"encoding_format": MARK},
        {"user": MARK},
        {MARK: MARK},
    ):
        yield "/v1/embeddings", {"model": model, "input": MARK, **fields}
    yield "/embed", {"inputs": MARK}
    yield "/embed_all", {"inputs": [MARK], "prompt_name": MARK}
    yield "/embed_sparse", {"inputs": MARK}
    yield "/embeddings", {"model": model, "input": MARK}
    yield "/similarity", {"inputs": {"source_sentence": MARK, "sentences": [MARK, f"{MARK} too"]}}
    yield "/embed", {"inputs": [MARK, f"{MARK} too"], "truncate": True, "prompt_name": MARK}
    yield "/embed", {"inputs": MARK, "adapters": ["no-such-folder"], "adapter_source": "local"}
    for path in ("/classify", "/predict"):
        yield path, {"inputs": MARK}
        yield path, {"inputs": MARK, "parameters": {"api_token": TOKEN}}
    yield "/classify", {"input": [MARK], "model": model}
    yield "/classify_batch", {"inputs": [MARK]}
    for path in ("/rerank", "/v1/rerank", "/v2/rerank"):
        yield path, {"query": MARK, "documents": [MARK, {"text": f"{MARK} too"}], "model": model}
        yield path, {"query": MARK, "documents": [{MARK: MARK}]}
    yield "/rerank", {"query": MARK, "texts": [MARK], "return_text": True}
    for path in ("/score", "/v1/score"):
        yield path, {"text_1": MARK, "text_2": [MARK, f"{MARK} too"], "model": model}
    yield "/v1/messages/count_tokens", {"model": model, "messages": [_USER]}


async def ask_http(client: httpx.AsyncClient, model: str) -> int:
    """Send all of them, and leave one stream in its midst; return how many were answered."""
    num_answered = 0
    for path, body in http_requests(model):
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"content-type": "application/json"}
        answer = await client.post(path, content=raw, headers=headers)
        assert answer.status_code < 500, (path, answer.text)
        num_answered += answer.status_code == 200
    body = {"inputs": MARK, "parameters": {"max_new_tokens": 100, "ignore_eos_token": True}}
    async with client.stream("POST", "/generate_stream", json=body) as stream:
        async for _ in stream.aiter_lines():
            break
    return num_answered


def _messages() -> Iterator[tuple[str, Any]]:
    parameters = pb.Parameters(max_new_tokens=2)
    yield "Generate", pb.GenerateRequest(text=MARK, parameters=parameters)
    yield "Tokenize", pb.TokenizeRequest(text=MARK)
    yield "Embed", pb.EmbedRequest(text=MARK, prompt_name=MARK)
    yield "Embed", pb.EmbedRequest(text=MARK)
    yield "Classify", pb.ClassifyRequest(text=MARK, second_text=MARK)
    chat = pb.ChatRequest(parameters=parameters)
    chat.messages.add(role="user", content=MARK)
    yield "Chat", chat
    odd = pb.ChatRequest(parameters=parameters)
    odd.messages.add(role=MARK, content=MARK)
    odd.tools.add(name=MARK, parameters_schema=f'{{"{MARK}"')
    yield "Chat", odd
    for constraint in (
        pb.Constraint(choice=pb.Choice(texts=[MARK])), pb.Constraint(regex=f"({MARK}"),
        pb.Constraint(grammar=f"start: {MARK}"),
        *(pb.Constraint(json_schema=json.dumps(each)) for each in (_SCHEMA, *_BAD_SCHEMAS)),
        pb.Constraint(json_schema=MARK),
    ):  # fmt: skip
        bound = pb.Parameters(max_new_tokens=20, constraint=constraint)
        yield "Generate", pb.GenerateRequest(text=MARK, parameters=bound)
    absent = pb.Adapter(id="no-such-folder", source="local", api_token=TOKEN)
    lacking = pb.Parameters(adapter=absent, stop=[MARK])
    yield "Generate", pb.GenerateRequest(text=MARK, parameters=lacking)
    yield "Generate", pb.GenerateRequest(text=MARK * 10_000, parameters=parameters)


async def ask_grpc(stub: LoraxStub, metadata: tuple[tuple[str, str], ...] = ()) -> int:
    """The same over gRPC, streamed too; a call is cancelled in its midst."""
    num_answered = 0
    for name, message in _messages():
        for method in (name, f"{name}Stream"):
            if not hasattr(stub, method):
                continue
            call = getattr(stub, method)(message, metadata=metadata, timeout=60)
            try:
                if hasattr(call, "__aiter__"):
                    num_answered += bool([each async for each in call])
                else:
                    num_answered += bool(await call)
            except grpc.aio.AioRpcError as error:
                # What is at fault here is the request.
                if error.code() is grpc.StatusCode.INTERNAL:
                    raise
    endless = pb.Parameters(max_new_tokens=100, ignore_eos_token=True)
    call = stub.GenerateStream(
        pb.GenerateRequest(text=MARK, parameters=endless), metadata=metadata, timeout=60
    )
    assert await call.read()
    call.cancel()
    return num_answered
