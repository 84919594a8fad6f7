"""A request is one trace: from who asks through the router to the shard, in processes of their own."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from tests.e2e.conftest import OPTIONS
from tests.helpers.otlp_collector import Collector, Received
from tests.helpers.server import Server, free_port

from lorax_proto import lorax_pb2 as pb
from lorax_proto.lorax_pb2_grpc import LoraxStub

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
HEADERS = {"traceparent": f"00-{TRACE}-{SPAN}-01", "tracestate": "gateway=7"}
SECRET = "a-very-private-prompt"
BODY = {"inputs": f"{SECRET} fox", "parameters": {"max_new_tokens": 4, "ignore_eos_token": True}}
GRPC_PORT = free_port()


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        yield collector


@pytest.fixture(scope="module", params=["0", "1"], ids=["one process", "front"])
def server(
    request: pytest.FixtureRequest, tiny_model: Path, collector: Collector
) -> Iterator[Server]:
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "OTEL_BSP_SCHEDULE_DELAY": "100",
        "OTEL_EXPORTER_OTLP_HEADERS": "api-key=a-secret-of-the-collector",
    }  # fmt: skip
    options = ["--otlp-endpoint", collector.url, "--http-workers", request.param]
    options += ["--grpc-port", str(GRPC_PORT)]
    with Server("--model-id", str(tiny_model), *OPTIONS, *options, env=environment) as server:
        yield server


def trace_of(collector: Collector, trace_id: str, *names: str) -> dict[str, Received]:
    """Return the spans of a trace by name, once those are there."""

    def is_there(spans: list[Received]) -> bool:
        return set(names) <= {each.name for each in spans if each.trace_id == trace_id}

    spans = collector.wait_for(is_there)
    return {each.name: each for each in spans if each.trace_id == trace_id}


PARTS = ("validation", "tokenization", "queue", "prefill", "decode")


def check_connected(found: dict[str, Received], parent_id: str, service: str) -> Received:
    (root,) = [each for each in found.values() if each.is_server]
    assert (root.parent_id, root.service) == (parent_id, "lorax-router")
    for name in PARTS:
        assert (found[name].parent_id, found[name].service) == (root.span_id, "lorax-router")
    for name in ("shard prefill", "shard decode"):
        assert (found[name].parent_id, found[name].service) == (root.span_id, service)
        assert found[name].attributes["lorax.rank"] == 0
    return root


def test_a_request_over_http_is_one_trace_with_its_shard(server: Server, collector: Collector):
    with httpx.Client(base_url=server.url, timeout=60) as http:
        trace_id = os.urandom(16).hex()
        headers = HEADERS | {"traceparent": f"00-{trace_id}-{SPAN}-01"}
        assert http.post("/generate", json=BODY, headers=headers).status_code == 200
    found = trace_of(collector, trace_id, *PARTS, "shard prefill", "shard decode")
    root = check_connected(found, SPAN, "lorax-shard")
    assert {each.state for each in found.values()} == {"gateway=7"}
    about = root.attributes
    assert about["lorax.call"] == "/generate"
    assert about["gen_ai.usage.output_tokens"] == 4
    assert about["gen_ai.usage.input_tokens"] == found["shard prefill"].attributes["lorax.tokens"]
    assert about["gen_ai.response.finish_reasons"] == ["length"]
    assert found["shard decode"].attributes["lorax.tokens"] == 4
    order = [found[name] for name in ("validation", "queue", "prefill", "decode")]
    for before, after in itertools.pairwise(order):
        assert abs(before.end_ns - after.start_ns) < 1_000
    assert found["prefill"].start_ns <= found["shard prefill"].start_ns
    assert found["shard prefill"].end_ns <= found["prefill"].end_ns
    told = repr([each.attributes for each in found.values()])
    assert SECRET not in told and "secret" not in told
    assert collector.headers[-1]["api-key"] == "a-secret-of-the-collector"


def test_a_call_over_grpc_is_one_trace_with_its_shard(server: Server, collector: Collector):
    trace_id = os.urandom(16).hex()
    metadata = (("traceparent", f"00-{trace_id}-{SPAN}-01"),)
    with grpc.insecure_channel(f"127.0.0.1:{GRPC_PORT}") as channel:
        parameters = pb.Parameters(max_new_tokens=3, ignore_eos_token=True)
        LoraxStub(channel).Generate(
            pb.GenerateRequest(text="the fox", parameters=parameters), metadata=metadata, timeout=60
        )
    found = trace_of(collector, trace_id, *PARTS, "shard prefill", "shard decode")
    root = check_connected(found, SPAN, "lorax-shard")
    assert root.attributes["lorax.call"] == "Generate"


def test_who_is_not_sampled_is_not_traced_and_who_has_no_trace_begins_one(
    server: Server, collector: Collector
):
    trace_id = os.urandom(16).hex()
    num = len(collector.spans)
    with httpx.Client(base_url=server.url, timeout=60) as http:
        unsampled = {"traceparent": f"00-{trace_id}-{SPAN}-00"}
        assert http.post("/generate", json=BODY, headers=unsampled).status_code == 200
        assert (
            http.post("/generate", json=BODY, headers={"traceparent": "nonsense"}).status_code
            == 200
        )
        refused = http.post("/generate", json={"inputs": 7})
        assert refused.status_code == 422
    own = collector.wait_for(lambda spans: sum(each.is_server for each in spans[num:]) == 2)[num:]
    roots = {each.attributes["lorax.outcome"]: each for each in own if each.is_server}
    assert set(roots) == {"ok", "validation"}
    assert all(each.parent_id == "" for each in roots.values())
    assert not [each for each in collector.spans if each.trace_id == trace_id]
    assert [each.is_error for each in roots.values()].count(True) == 1


def test_what_waits_is_delivered_at_the_end(tiny_model: Path):
    with Collector() as collector:
        # Longer than the server lives.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OTEL_BSP_SCHEDULE_DELAY": "600000"}
        options = ("--otlp-endpoint", collector.url)
        with Server("--model-id", str(tiny_model), *OPTIONS, *options, env=environment) as server:
            server.post("/generate", BODY)
            assert server.stop(signal.SIGTERM) == 0
        services = {each.service for each in collector.spans}
        assert services == {"lorax-router", "lorax-shard"}


def test_without_a_collector_requests_are_answered_and_it_is_said_once(tiny_model: Path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OTEL_BSP_SCHEDULE_DELAY": "50"}
    options = ("--otlp-endpoint", f"http://127.0.0.1:{free_port()}")
    with Server("--model-id", str(tiny_model), *OPTIONS, *options, env=environment) as server:
        for _ in range(3):
            answer: Any = server.post("/generate", BODY)
            assert answer["generated_text"] is not None
        assert server.stop(signal.SIGTERM) == 0
    said = [line for line in server.lines if "takes no spans" in line]
    # By the router and by the shard.
    assert len(said) == 2
    assert not [line for line in server.lines if "Traceback" in line]


# Runs in each process of the server before anything else: notes what is looked for.
WATCH = """
import os, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name.startswith(("opentelemetry.sdk", "opentelemetry.exporter", "lorax_telemetry")):
            with open(os.environ["WATCH_FILE"], "a") as file:
                file.write(f"{sys.argv}: {name}\\n")
        with open(os.environ["WATCH_FILE"] + ".begun", "a") as file:
            file.write("")
        return None

sys.meta_path.insert(0, Watch())
"""


def test_without_the_option_nothing_of_it_is_imported(tiny_model: Path, tmp_path: Path):
    (tmp_path / "sitecustomize.py").write_text(WATCH)
    noted = tmp_path / "noted"
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path), "WATCH_FILE": str(noted),
        "OTEL_TRACES_SAMPLER": "always_on",
    }  # fmt: skip
    with Server("--model-id", str(tiny_model), *OPTIONS, env=environment) as server:
        server.post("/generate", BODY)
        assert server.stop(signal.SIGTERM) == 0
    assert (tmp_path / "noted.begun").exists()
    assert not noted.exists(), noted.read_text()
