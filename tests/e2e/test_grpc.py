"""The public gRPC service of a whole server: its examples, HTTP beside it, tools that know no stubs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.helpers.grpc_reflection import call_by_reflection
from tests.helpers.peft_folders import save_adapter
from tests.helpers.server import Server, free_port

from lorax_proto import lorax_pb2 as pb
from lorax_proto.lorax_pb2_grpc import LoraxStub

EXAMPLES = Path(__file__).parents[2] / "examples"
QUESTION = "I love how the sea looks today. What do you think?"


@pytest.fixture(scope="module")
def adapters(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the adapters lie that are served."""
    root = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("poet", "scribe")):
        save_adapter(tiny_model, root / name, seed=seed, r=4, target_modules=["q_proj", "o_proj"])
    return root


@pytest.fixture(scope="module")
def serve(launch: Callable[..., Server], adapters: Path) -> Callable[[], tuple[Server, str]]:
    """Make servers that listen for gRPC, too; each comes with that address."""

    def make() -> tuple[Server, str]:
        port = str(free_port())
        store = ("--adapter-store-dir", f"{adapters}-store")
        server = launch("--grpc-port", port, "--adapter-local-root", str(adapters), *store)
        return server, f"127.0.0.1:{port}"

    return make


@pytest.fixture(scope="module")
def served(serve: Callable[[], tuple[Server, str]]) -> Iterator[tuple[Server, str]]:
    server, address = serve()
    with server:
        yield server, address


@pytest.fixture
def server(served: tuple[Server, str]) -> Server:
    return served[0]


@pytest.fixture
def channel(served: tuple[Server, str]) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(served[1]) as channel:
        yield channel


def question(adapter: str = "") -> pb.ChatRequest:
    request = pb.ChatRequest(messages=[pb.ChatMessage(role="user", content=QUESTION)])
    request.parameters.max_new_tokens = 24
    request.parameters.ignore_eos_token = True
    if adapter:
        request.parameters.adapter.id, request.parameters.adapter.source = adapter, "local"
    return request


@pytest.mark.parametrize("adapter", ["", "poet", "scribe"])
def test_an_answer_is_the_one_of_http_streamed_or_not(
    server: Server, channel: grpc.Channel, adapter: str
) -> None:
    stub = LoraxStub(channel)
    whole = stub.Chat(question(adapter), timeout=120).choices[0]
    chunks = list(stub.ChatStream(question(adapter), timeout=120))
    assert "".join(each.content for each in chunks) == whole.message.content
    assert chunks[-1].finish_reason == whole.finish_reason
    parameters = {"max_new_tokens": 24, "apply_chat_template": True, "ignore_eos_token": True,
                  "adapter_id": adapter or None, "adapter_source": "local"}  # fmt: skip
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
        "parameters": {"adapter": {"id": "poet", "source": "local"}, "max_new_tokens": 24,
                       "ignore_eos_token": True},
    }  # fmt: skip
    answer = call_by_reflection(channel, "Chat", document)
    expected = LoraxStub(channel).Chat(question("poet"), timeout=120)
    assert answer["choices"][0]["message"]["content"] == expected.choices[0].message.content
    info = call_by_reflection(channel, "Info", {})
    assert info["maxTotalTokens"] > info["maxInputTokens"] > 0


def test_a_server_that_is_told_to_stop_finishes_its_calls_and_refuses_others(
    serve: Callable[[], tuple[Server, str]],
) -> None:
    server, address = serve()
    with server, grpc.insecure_channel(address) as channel:
        stub, health = LoraxStub(channel), health_pb2_grpc.HealthStub(channel)
        request = question()
        request.parameters.max_new_tokens = 400
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
        assert chunks[-1].usage.generated_tokens == 400
        assert server.stop() == 0


@pytest.fixture(scope="module")
def demo_address() -> Iterator[str]:
    """Where the embedded model is served, with its demo adapters."""
    port = str(free_port())
    with Server(
        "--grpc-port", port, "--device", "cpu", "--num-blocks", "640",
        "--adapter-local-root", str(EXAMPLES / "adapters"),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ):  # fmt: skip
        yield f"127.0.0.1:{port}"


@pytest.mark.slow
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
def test_the_examples_run_as_they_are(demo_address: str, program: str, words: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "grpc" / program), demo_address],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [each for each in words if each not in done.stdout] == []
