"""The public gRPC service of a whole server: its examples, HTTP beside it, tools that know no stubs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.helpers.grpc_reflection import call_by_reflection
from tests.helpers.server import Server, free_port

from lorax_proto import lorax_pb2 as pb
from lorax_proto.lorax_pb2_grpc import LoraxStub

EXAMPLES = Path(__file__).parents[2] / "examples"
QUESTION = "I love how the sea looks today. What do you think?"

pytestmark = pytest.mark.slow


class GrpcPort(Server):
    """A server with the demo adapters, and where its gRPC is."""

    def __init__(self) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        super().__init__(
            "--grpc-port", self.address.rpartition(":")[2], "--device", "cpu",
            "--adapter-local-root", str(EXAMPLES / "adapters"), "--num-blocks", "640",
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip


@pytest.fixture(scope="module")
def server() -> Iterator[GrpcPort]:
    with GrpcPort() as running:
        yield running


@pytest.fixture
def channel(server: GrpcPort) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.address) as channel:
        yield channel


def question(adapter: str = "") -> pb.ChatRequest:
    request = pb.ChatRequest(messages=[pb.ChatMessage(role="user", content=QUESTION)])
    request.parameters.max_new_tokens = 24
    if adapter:
        request.parameters.adapter.id, request.parameters.adapter.source = adapter, "local"
    return request


@pytest.mark.parametrize("adapter", ["", "pirate", "json-only"])
def test_an_answer_is_the_one_of_http_streamed_or_not(
    server: GrpcPort, channel: grpc.Channel, adapter: str
) -> None:
    stub = LoraxStub(channel)
    whole = stub.Chat(question(adapter), timeout=120).choices[0]
    chunks = list(stub.ChatStream(question(adapter), timeout=120))
    assert "".join(each.content for each in chunks) == whole.message.content
    assert chunks[-1].finish_reason == whole.finish_reason
    parameters = {"max_new_tokens": 24, "apply_chat_template": True, "adapter_id": adapter or None,
                  "adapter_source": "local"}  # fmt: skip
    over_http = server.post("/generate", {"inputs": QUESTION, "parameters": parameters})
    assert over_http["generated_text"] == whole.message.content


def test_an_output_is_bound_to_a_choice(channel: grpc.Channel) -> None:
    request = question()
    request.parameters.constraint.choice.texts.extend(["yes", "no"])
    answer = LoraxStub(channel).Chat(request, timeout=120)
    assert answer.choices[0].message.content in ("yes", "no")


def test_tools_that_know_no_stubs_can_call_it(channel: grpc.Channel) -> None:
    document = {
        "messages": [{"role": "user", "content": QUESTION}],
        "parameters": {"adapter": {"id": "pirate", "source": "local"}, "max_new_tokens": 24},
    }
    answer = call_by_reflection(channel, "Chat", document)
    expected = LoraxStub(channel).Chat(question("pirate"), timeout=120)
    assert answer["choices"][0]["message"]["content"] == expected.choices[0].message.content
    info = call_by_reflection(channel, "Info", {})
    assert info["maxTotalTokens"] > info["maxInputTokens"] > 0


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("generate.py", ["Paris", "tokens in"]),
        ("chat.py", ["base model: ", "pirate: ", "local:sentiment is resident"]),
        ("tools.py", ["get_weather", "city", "in '"]),
        ("errors.py", ["field: temperature", "ADAPTER_NOT_FOUND", "PERMISSION_DENIED",
                       "DEADLINE_EXCEEDED", "Paris"]),
    ],
)  # fmt: skip
def test_the_examples_run_as_they_are(server: GrpcPort, program: str, words: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "grpc" / program), server.address],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [each for each in words if each not in done.stdout] == []


def test_a_server_that_is_told_to_stop_finishes_its_calls_and_refuses_others() -> None:
    with GrpcPort() as server, grpc.insecure_channel(server.address) as channel:
        stub, health = LoraxStub(channel), health_pb2_grpc.HealthStub(channel)
        request = question()
        request.parameters.max_new_tokens = 300
        request.parameters.ignore_eos_token = True
        stream = stub.ChatStream(request, timeout=120)
        parts = [next(stream).content]
        assert server.process is not None
        os.kill(server.process.pid, signal.SIGTERM)
        watch = health.Watch(health_pb2.HealthCheckRequest(), timeout=120)
        for status in watch:
            if status.status == health_pb2.HealthCheckResponse.NOT_SERVING:
                break
        with pytest.raises(grpc.RpcError) as raised:
            stub.Chat(question(), timeout=120)
        assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
        chunks = list(stream)
        parts += [chunk.content for chunk in chunks]
        assert chunks[-1].usage.generated_tokens == 300
        assert server.stop() == 0
