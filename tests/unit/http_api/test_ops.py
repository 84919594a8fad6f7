"""Health, startup, info, metrics, CORS."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from tests.helpers.http_app import World
from tests.helpers.scripted_engine import failure

from lorax_contract.errors import GenerationError, UnhealthyError
from lorax_router.http_api.app import Cors


def get(path: str, world: World | None = None, **headers: str) -> httpx.Response:
    async def run() -> httpx.Response:
        async with (world or World()).client() as client:
            return await client.get(path, headers=headers)

    return asyncio.run(run())


@pytest.mark.parametrize("path", ["/", "/health", "/ping"])
def test_health(path):
    response = get(path)
    assert (response.status_code, response.content) == (200, b"")
    world = World()
    world.engine.unhealthy = UnhealthyError("rank 0 at unix:/secret is gone", public="")
    response = get(path, world)
    assert response.status_code == 503
    assert response.json() == {"error": "unhealthy", "error_type": "healthcheck"}


READABLE = ("/", "/health", "/ping", "/startup", "/info", "/metrics", "/docs", "/docs/",
            "/api-doc/openapi.json", "/openapi.json")  # fmt: skip


@pytest.mark.parametrize("path", READABLE)
def test_what_can_be_read_can_be_asked_for_its_head(path):
    async def run() -> tuple[httpx.Response, httpx.Response]:
        async with World().client() as client:
            return await client.head(path), await client.get(path)

    head, whole = asyncio.run(run())
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type" if whole.content else "content-length"]
    assert head.headers.get("content-type") == whole.headers.get("content-type")


@pytest.mark.parametrize(("path", "status"), [("/generate", 405), ("/nowhere", 404)])
def test_the_head_of_nothing_is_nothing(path, status):
    async def run() -> httpx.Response:
        async with World().client() as client:
            return await client.head(path)

    assert asyncio.run(run()).status_code == status


def test_a_hanging_shard_does_not_hang_health():
    world = World(health_timeout_s=0.05)
    world.engine.hangs = True
    assert get("/health", world).status_code == 503


def test_startup_generates_a_token():
    world = World()
    assert get("/startup", world).status_code == 200
    (spec,) = world.engine.submitted
    assert spec.stopping.max_new_tokens == 1
    world.engine.script = lambda spec: failure(GenerationError("no model"))
    response = get("/startup", world)
    assert response.status_code == 500
    assert response.json()["error_type"] == "generation"


def test_info_has_lorax_s_keys_the_memory_and_what_computes():
    document = get("/info").json()
    assert set(document) == {
        "model_id", "model_sha", "model_dtype", "model_device_type", "model_pipeline_tag",
        "max_concurrent_requests", "max_best_of", "max_stop_sequences", "max_input_length",
        "max_total_tokens", "waiting_served_ratio", "max_batch_total_tokens",
        "max_waiting_tokens", "validation_workers", "eager_prefill", "version", "sha",
        "docker_label", "request_logger_url", "memory", "backends", "task", "tasks", "model_type",
        "max_client_batch_size", "auto_truncate",
        "labels",
    }  # fmt: skip
    assert document["memory"] == {"fullest_rank": 1, "ranks": [{"unused": 9}, {"unused": 7}]}
    assert document["backends"] == {
        "attention": "sdpa", "linear": "panel", "elementwise": "cpp", "lora": None,
    }  # fmt: skip
    assert document["task"] == "generate"
    assert (document["tasks"], document["labels"]) == (["generate", "embed"], None)
    assert document["model_id"] == "tests/tiny"
    assert document["max_input_length"] == 20


def test_metrics_as_text_and_as_json():
    text = get("/metrics")
    assert text.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert "\nlorax_requests_running 2.0\n" in text.text
    document = get("/metrics", accept="application/json").json()
    assert set(get("/metrics?format=json").json()) == set(document)
    assert get("/metrics?format=prometheus", accept="application/json").text.startswith("# HELP")
    assert document["lorax_requests_running"]["data"] == [
        {"key": "lorax_requests_running", "value": 2.0}
    ]


def test_no_page_of_another_origin_may_call_by_default():
    async def run() -> tuple[httpx.Response, httpx.Response]:
        asks = {"access-control-request-method": "POST", "origin": "https://page.example"}
        async with World().client() as client:
            plain = await client.get("/health", headers={"origin": asks["origin"]})
            return plain, await client.options("/generate", headers=asks)

    for response in asyncio.run(run()):
        assert not any(name.startswith("access-control") for name in response.headers)


def test_any_origin_may_call_if_that_is_asked_for():
    world = World(cors=Cors(origins=["*"]))
    response = get("/health", world, origin="https://page.example")
    assert response.headers["access-control-allow-origin"] == "*"


@pytest.mark.parametrize(
    "headers",
    [
        "authorization, content-type, x-stainless-lang, x-stainless-retry-count",
        "anthropic-dangerous-direct-browser-access, anthropic-version, x-api-key",
    ],
)
def test_pages_that_may_call_may_do_so_with_any_sdk(headers):
    async def run() -> httpx.Response:
        async with World(cors=Cors(origins=["https://a.example"])).client() as client:
            asks = {
                "origin": "https://a.example",
                "access-control-request-method": "POST",
                "access-control-request-headers": headers,
            }
            return await client.options("/v1/chat/completions", headers=asks)

    response = asyncio.run(run())
    assert response.status_code == 200, response.text
    assert response.headers["access-control-allow-headers"] == headers


def test_origins_can_be_named():
    async def run() -> tuple[httpx.Response, httpx.Response]:
        cors = Cors(origins=["https://a.example"], headers=["x-key"], methods=["POST"])
        async with World(cors=cors).client() as client:
            asks = {"access-control-request-method": "POST"}
            good = await client.options(
                "/generate", headers={"origin": "https://a.example", **asks}
            )
            bad = await client.options("/generate", headers={"origin": "https://b.example", **asks})
            return good, bad

    good, bad = asyncio.run(run())
    assert good.headers["access-control-allow-origin"] == "https://a.example"
    assert "x-key" in good.headers["access-control-allow-headers"]
    assert bad.status_code == 400
    assert "access-control-allow-origin" not in bad.headers
