"""Adapters over HTTP: management, headers, metrics."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tests.helpers.adapter_world import adapter_world, fetched
from tests.helpers.http_app import World, events, until
from tests.helpers.in_loop import in_loop

from lorax_contract.adapters import AdapterUnavailableError, Reason, refused
from lorax_contract.step import AdapterHandle
from lorax_router.service.adapters.selection import SelectionPolicy

MIB = 1 << 20
ROUTES = ["load", "unload", "pin", "unpin", "reload"]


def body(adapter: str | None, **params: Any) -> dict[str, Any]:
    parameters = {"adapter_id": adapter, "adapter_source": "local", "max_new_tokens": 2, **params}
    return {"inputs": "w1", "parameters": parameters}


@in_loop
async def test_load_pin_unpin_reload_and_unload_say_what_happened():
    async with adapter_world() as world:
        loaded = await world.post("load", adapter_id="a")
        assert loaded.status_code == 200
        answer = loaded.json()
        assert answer.pop("last_used") > 1.6e9
        assert answer == {
            "adapter_id": "a",
            "adapter_source": "local",
            "revision": None,
            "alias_of": None,
            "version": "1",
            "content_digest": "content of a",
            "rank": 8,
            "state": "resident",
            "pinned": False,
            "bytes": {"device": MIB, "host": MIB, "disk": MIB},
            "waiting": 0,
            "running": 0,
            "uses": 1,
            "warnings": [],
            "failure": None,
        }
        assert (await world.post("pin", adapter_id="a")).json()["pinned"] is True
        assert (await world.list())["a"]["pinned"] is True
        assert (await world.post("unpin", adapter_id="a")).json()["pinned"] is False
        world.sources.contents["a"] = fetched("new", version="2")
        answer = (await world.post("reload", adapter_id="a")).json()
        assert (answer["version"], answer["changed"]) == ("2", True)
        await world.post("load", adapter_id="a")
        answer = (await world.post("unload", adapter_id="a")).json()
        assert answer == {
            "adapter_id": "a",
            "adapter_source": "local",
            "revision": None,
            "state": "unloaded",
            "freed": {"device": MIB, "host": MIB, "disk": MIB},
            "shared_with": [],
        }
        assert await world.list() == {}


@in_loop
async def test_a_loaded_adapter_serves_its_first_request_without_a_step_of_waiting():
    async with adapter_world() as world:
        await world.post("load", adapter_id="a", pin=True)
        prepared = world.shard.prepared
        answer = await world.client.post("/generate", json=body("a"))
        assert answer.status_code == 200
        assert "x-adapter-wait-time" not in answer.headers
        assert (world.shard.prepared, len(world.shard.queries)) == (prepared, 1)


@in_loop
async def test_preloading_does_not_switch_dynamic_loading_off():
    """W36: LoRAX serves the preloaded ones and nothing else."""
    async with adapter_world() as world:
        await world.post("load", adapter_id="kept", pin=True)
        assert (await world.client.post("/generate", json=body("other"))).status_code == 200


@pytest.mark.parametrize("verb", [verb for verb in ROUTES if verb != "load"])
def test_a_name_that_is_not_loaded_is_not_found(verb):
    @in_loop
    async def scene():
        async with adapter_world() as world:
            answer = await world.post(verb, adapter_id="a")
            assert answer.status_code == 404
            assert answer.json() == {
                "error": "adapter local:a is not loaded; GET /v1/adapters lists those that are, "
                "private ones to callers whose token opened them",
                "error_type": "not_found",
            }

    scene()


@pytest.mark.parametrize(
    ("error", "status", "error_type"),
    [
        (refused("its peft_type is not served"), 422, "validation"),
        (AdapterUnavailableError(Reason.NOT_FOUND, "no such folder"), 422, "validation"),
        (AdapterUnavailableError(Reason.NO_ACCESS, "no such folder"), 422, "validation"),
        (AdapterUnavailableError(Reason.TRANSIENT, "the hub is down"), 424, "generation"),
    ],
)
def test_what_cannot_be_loaded_is_said_in_words_and_in_the_list(error, status, error_type):
    @in_loop
    async def scene():
        async with adapter_world() as world:
            world.sources.contents["a"] = error
            answer = await world.post("load", adapter_id="a")
            assert (answer.status_code, answer.json()["error_type"]) == (status, error_type)
            assert answer.json()["error"].endswith(error.text)
            assert "during generation" not in answer.json()["error"]
            listed = (await world.list())["a"]
            assert listed["state"] == ("refused" if status == 422 else "failed")
            assert listed["failure"] == {"reason": error.reason.value, "text": error.text}

    scene()


@in_loop
async def test_what_is_odd_about_an_adapter_is_in_the_list():
    async with adapter_world() as world:
        world.sources.contents["a"] = fetched("a", warnings=("lora_alpha is 0",))
        answer = await world.post("load", adapter_id="a")
        assert answer.json()["warnings"] == ["lora_alpha is 0"]
        assert (await world.list())["a"]["warnings"] == ["lora_alpha is 0"]


@pytest.mark.parametrize("verb", ROUTES)
@pytest.mark.parametrize(
    ("sent", "status", "words"),
    [
        ({}, 422, "adapter_id`"),
        ({"adapter_id": ""}, 422, "`adapter_id` must name an adapter"),
        ({"adapter_id": "__base_model__"}, 422, "`adapter_id` must name an adapter"),
        ({"adapter_id": 5}, 422, "`adapter_id`"),
        ({"adapter_id": "a\nb"}, 422, "control characters"),
        ({"adapter_id": "a", "revision": "x\x7f"}, 422, "control characters"),
        ({"adapter_id": "a" * 600}, 422, "longer than 512"),
        ({"adapter_id": "a", "adapter_source": "ftp"}, 422, "'ftp' is not known"),
        ({"adapter_id": "a@1", "adapter_source": "hub", "revision": "2"}, 422, "two revisions"),
    ],
)
def test_w2_what_is_no_name_is_refused(verb, sent, status, words):
    @in_loop
    async def scene():
        async with adapter_world() as world:
            answer = await world.post(verb, **sent)
            assert answer.status_code == status
            assert words in answer.json()["error"]
            assert await world.list() == {}
            assert world.shard.queries == []

    scene()


@in_loop
async def test_the_base_model_is_no_adapter_also_where_an_adapter_is_the_default():
    async with adapter_world(adapter_id="a", adapter_source="local") as world:
        answer = await world.post("unload", adapter_id="__base_model__")
        assert answer.status_code == 422


@in_loop
async def test_the_token_is_the_bearers_unless_the_body_has_one():
    async with adapter_world() as world:
        headers = {"authorization": "Bearer from-header"}
        for sent in ({}, {"api_token": "from-body"}):
            await world.admin.post(
                "/v1/adapters/load",
                json={"adapter_id": f"a{len(sent)}", "adapter_source": "hub", **sent},
                headers=headers,
            )
        assert [query.token for query in world.shard.queries] == ["from-header", "from-body"]


@in_loop
async def test_a_revision_is_part_of_the_name():
    async with adapter_world() as world:
        sent = {"adapter_id": "org/x", "adapter_source": "hub"}
        await world.post("load", **sent, revision="v1")
        await world.post("load", adapter_id="org/x@v2", adapter_source="hub")
        listed = (await world.client.get("/v1/adapters")).json()["adapters"]
        assert [(each["adapter_id"], each["revision"]) for each in listed] == [
            ("org/x", "v1"),
            ("org/x", "v2"),
        ]
        assert (await world.post("unload", **sent)).status_code == 404
        assert (await world.post("unload", **sent, revision="v1")).status_code == 200


@in_loop
async def test_a_pin_that_would_take_the_last_slot_is_refused():
    async with adapter_world(max_active_adapters=2) as world:
        assert (await world.post("load", adapter_id="a", pin=True)).status_code == 200
        answer = await world.post("load", adapter_id="b", pin=True)
        assert answer.status_code == 422
        assert "the server has 2 slots for adapters, pins hold 1 of them" in answer.json()["error"]
        assert "--max-active-adapters" in answer.json()["error"]
        assert (await world.list())["b"]["pinned"] is False


@in_loop
async def test_a_draining_server_manages_nothing():
    async with adapter_world() as world:
        world.parts.service.stop_admitting()
        assert (await world.post("load", adapter_id="a")).status_code == 503


@in_loop
async def test_where_clients_ask_adapters_are_told_of_and_not_managed():
    async with adapter_world() as world:
        await world.post("load", adapter_id="a", pin=True)
        for verb in ROUTES:
            answer = await world.client.post(
                f"/v1/adapters/{verb}", json={"adapter_id": "a", "adapter_source": "local"}
            )
            assert (answer.status_code, answer.json()["error_type"]) == (403, "forbidden")
            assert "--admin-port" in answer.json()["error"]
        listed = (await world.list())["a"]
        assert (listed["state"], listed["pinned"]) == ("resident", True)


def test_a_router_without_adapters_has_no_such_routes():
    async def scene():
        async with World().client() as client:
            assert (await client.get("/v1/adapters")).status_code == 404

    asyncio.run(scene())


@in_loop
async def test_a_server_of_the_base_model_says_so():
    async with adapter_world(adapter_refusal="an adapter is merged into the weights") as world:
        answer = await world.post("load", adapter_id="a")
        assert answer.status_code == 422
        assert "merged into the weights" in answer.json()["error"]
        assert await world.list() == {}
        assert not any("lorax_adapter_slots" in name for name in await world.metrics())


@in_loop
async def test_the_document_describes_the_routes():
    async with adapter_world() as world:
        document = (await world.admin.get("/api-doc/openapi.json")).json()
        for_clients = (await world.client.get("/api-doc/openapi.json")).json()
        assert {path for path in for_clients["paths"] if "adapters" in path} == {"/v1/adapters"}
        for verb in ROUTES:
            responses = document["paths"][f"/v1/adapters/{verb}"]["post"]["responses"]
            assert {"200", "422", "424"} <= responses.keys()
            assert ("404" in responses) == (verb != "load")
        fields = document["components"]["schemas"]["AdapterRequest"]["properties"]
        assert fields.keys() == {
            "adapter_id", "adapter_source", "revision", "api_token", "pin", "alias",
        }  # fmt: skip
        listed = document["components"]["schemas"]["AdapterResponse"]["properties"].keys()
        await world.post("load", adapter_id="a")
        assert (await world.list())["a"].keys() == listed


# --- headers --------------------------------------------------------------------


def named(headers: Any) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name.startswith("x-adapter")}


@in_loop
async def test_headers_name_the_adapter_and_split_its_cold_start():
    async with adapter_world() as world:
        timings = {"resolve": 0.5, "download": 1.0, "verify": 0.25}
        world.sources.contents["a"] = fetched("a", timings=timings)
        answer = await world.client.post("/generate", json=body("a"))
        found = named(answer.headers)
        assert found.pop("x-adapter-id") == "a"
        assert found.pop("x-adapter-source") == "local"
        assert found["x-adapter-download-time"] == "1000"
        assert {f"x-adapter-{phase}-time" for phase in ("resolve", "verify", "wait", "parse")} < {
            *found
        }
        warm = await world.client.post("/generate", json=body("a"))
        assert named(warm.headers) == {"x-adapter-id": "a", "x-adapter-source": "local"}


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
def test_headers_of_merged_static_and_no_adapters_are_the_same_for_streams(path):
    @in_loop
    async def scene():
        async with adapter_world(
            adapter_id="own", adapter_source="local", default_adapter_source="s3"
        ) as world:
            merged = {"ids": ["a", "b"], "weights": [1.0, 1.0]}
            for sent, expected in (
                (body("a"), ("a", "local")),
                (body("a", adapter_source=None), ("a", "s3")),
                (body("org/x@v1", adapter_source="hub"), ("org/x@v1", "hub")),
                (body(None, merged_adapters=merged), ("a,b", "local")),
                (body(None, adapter_source=None), ("own", "local")),
            ):
                answer = await world.client.post(path, json=sent)
                assert answer.status_code == 200
                found = named(answer.headers)
                assert (found["x-adapter-id"], found["x-adapter-source"]) == expected
                if "stream" in path:
                    assert len(found) == 2
                    assert events(answer.text)[-1]["generated_text"]

    scene()


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
def test_a_requests_adapter_is_found_out_once(path, monkeypatch):
    found = []
    selection_of = SelectionPolicy.selection_of

    def counted(self: SelectionPolicy, params: Any, adapter_id: str | None = None) -> Any:
        found.append(params.adapter_id if adapter_id is None else adapter_id)
        return selection_of(self, params, adapter_id)

    monkeypatch.setattr(SelectionPolicy, "selection_of", counted)

    @in_loop
    async def scene():
        async with adapter_world() as world:
            answer = await world.client.post(path, json=body("a"))
            assert named(answer.headers)["x-adapter-id"] == "a"
            assert found == ["a"]

    scene()


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
@pytest.mark.parametrize("name", [None, "", "__base_model__"])
def test_requests_for_the_base_model_have_no_such_headers(path, name):
    @in_loop
    async def scene():
        async with adapter_world() as world:
            answer = await world.client.post(path, json=body(name))
            assert answer.status_code == 200
            assert named(answer.headers) == {}

    scene()


@in_loop
async def test_w2_a_stream_with_an_impossible_name_is_answered_in_words():
    async with adapter_world() as world:
        answer = await world.client.post("/generate_stream", json=body("x\r\nset-cookie: a"))
        assert answer.status_code == 422
        assert "set-cookie" not in answer.headers
        assert answer.json()["error_type"] == "validation"


# --- metrics --------------------------------------------------------------------


@in_loop
async def test_requests_failures_and_tokens_are_counted_by_adapter():
    async with adapter_world(max_adapter_labels=2) as world:
        world.sources.contents["gone"] = AdapterUnavailableError(Reason.NOT_FOUND, "no such folder")
        for name in ("a", "a", "b", "c", "gone", None):
            await world.client.post("/generate", json=body(name))
        samples = await world.metrics()
        counts = {
            label: samples[f'lorax_adapter_request_count{{adapter="{label}"}}']
            for label in ("a", "b", "other")
        }
        assert counts == {"a": 2.0, "b": 1.0, "other": 2.0}
        assert samples['lorax_adapter_generated_tokens{adapter="a"}'] == 4.0
        assert samples['lorax_adapter_request_failure{adapter="a"}'] == 0.0
        assert samples['lorax_adapter_request_failure{adapter="other"}'] == 1.0
        assert samples['lorax_request_failure{err="download_adapter"}'] == 1.0
        assert 'lorax_adapter_request_count{adapter="gone"}' not in samples
        assert samples['lorax_adapter_resident{adapter="a"}'] == 1.0
        assert samples['lorax_adapter_resident{adapter="other"}'] == 1.0


@in_loop
async def test_residency_in_the_metrics_agrees_with_the_list():
    async with adapter_world(max_active_adapters=3) as world:
        world.sources.contents["slow"] = asyncio.get_running_loop().create_future()
        world.sources.contents["bad"] = refused("no")
        for name in ("a", "b", "c,d", "e", "bad"):
            await world.client.post("/generate", json=body(name))
        waiting = world.task("slow")
        await until(lambda: len(world.shard.queries) == 6)
        listed = await world.list()
        samples = await world.metrics()
        resident = sorted(name for name, each in listed.items() if each["state"] == "resident")
        assert len(resident) == 3
        (info,) = [name for name in samples if name.startswith("vllm:lora_requests_info")]
        shown = ",".join(resident).replace("c,d", "c%2Cd")
        assert f'running_lora_adapters="{shown}"' in info
        assert 'waiting_lora_adapters="slow"' in info
        assert 'max_lora="3"' in info
        loaded = {name for name in samples if name.startswith("vllm:lora_adapter_loaded")}
        assert loaded == {
            f'vllm:lora_adapter_loaded{{adapter_name="{name}",level="gpu",pinned="false"}}'
            for name in resident
        }
        for name, number in (("num_gpu_loaded", 3.0), ("max_gpu", 3.0)):
            assert samples[f'vllm:{name}_lora_adapters{{model_name="fake"}}'] == number
        for state in ("resident", "absent", "refused", "resolving", "preparing"):
            number = sum(each["state"] == state for each in listed.values())
            assert samples[f'lorax_adapters{{state="{state}"}}'] == number
        assert samples["lorax_adapter_slots_held"] == samples["lorax_adapter_slots"] == 3.0
        device = sum(each["bytes"]["device"] for each in listed.values())
        assert samples["lorax_adapter_bytes_held"] == device == 3 * MIB
        assert samples["lorax_adapter_bytes"] == 1 << 30
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)


@in_loop
async def test_gateways_see_that_nothing_is_loaded_and_what_is_pinned():
    async with adapter_world(max_active_adapters=3) as world:
        before = await world.metrics()
        assert before['vllm:num_gpu_loaded_lora_adapters{model_name="fake"}'] == 0.0
        assert before['vllm:max_gpu_lora_adapters{model_name="fake"}'] == 3.0
        await world.admin.post("/v1/adapters/load", json={"adapter_id": "a", "pin": True})
        samples = await world.metrics()
        loaded = 'vllm:lora_adapter_loaded{adapter_name="a",level="gpu",pinned="true"}'
        assert samples[loaded] == 1.0


@in_loop
async def test_an_id_that_is_resident_under_one_source_is_not_shown_as_waiting_for_another():
    async with adapter_world() as world:
        await world.client.post("/generate", json=body("a"))
        world.sources.contents["a"] = asyncio.get_running_loop().create_future()
        waiting = world.task("a", adapter_source="hub")
        await until(lambda: len(world.shard.queries) == 2)
        samples = await world.metrics()
        (info,) = [name for name in samples if name.startswith("vllm:lora_requests_info")]
        assert 'running_lora_adapters="a",waiting_lora_adapters=""' in info
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)


@in_loop
async def test_what_is_replaced_and_still_in_use_is_not_resident_for_new_requests():
    async with adapter_world() as world:
        world.shard.step_delay_s = 0.001
        world.sources.contents["a"] = fetched("old", valid_s=0)
        stream = await world.stream("a", 100)
        world.sources.contents["a"] = fetched("new", valid_s=0)
        await world.generate("a")
        samples = await world.metrics()
        assert samples['lorax_adapters{state="retiring"}'] == 1.0
        assert samples['lorax_adapters{state="resident"}'] == 1.0
        assert samples["lorax_adapter_slots_held"] == 2.0
        await world.finish(stream)
        await world.gone(AdapterHandle(1))


@in_loop
async def test_gateways_see_models_by_the_names_that_requests_send():
    async with adapter_world(
        served_model_names=["shown", "other"], adapter_aliases=["poet=local:a"]
    ) as world:
        await world.post("load", adapter_id="poet", adapter_source="alias")
        samples = await world.metrics()
        assert samples['vllm:num_requests_running{engine="0",model_name="shown"}'] == 0.0
        assert samples['vllm:num_gpu_loaded_lora_adapters{model_name="shown"}'] == 1.0
        (info,) = [name for name in samples if name.startswith("vllm:lora_requests_info")]
        assert 'running_lora_adapters="poet"' in info


@in_loop
async def test_every_route_of_both_listeners_tells_what_any_request_may_be_answered_with():
    async with adapter_world() as world:
        for client in (world.client, world.admin):
            document = (await client.get("/api-doc/openapi.json")).json()
            for path, verbs in document["paths"].items():
                for verb, told in verbs.items():
                    assert {"200", "400", "408", "429", "500"} <= set(told["responses"]), path
                    if verb == "post":
                        assert {"413", "415", "503"} <= set(told["responses"]), path
