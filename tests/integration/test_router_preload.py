"""The router as a process that has adapters of its own: there before it is ready, or no start."""

from __future__ import annotations

import asyncio
import signal
from typing import Any

import httpx
import pytest
from tests.helpers.adapter_world import fetched
from tests.helpers.fake_shard_server import serve
from tests.integration.test_router_process import config_of, fake_shard, play, started

from lorax_contract.adapters import AdapterQuery, AdapterUnavailableError, Reason, refused
from lorax_contract.exit_codes import ExitCode
from lorax_router.shards.fake.shard import fake_fetched

BODY = {"inputs": "w1 w2", "parameters": {"max_new_tokens": 3, "details": True}}


def body(adapter: str) -> dict[str, Any]:
    parameters = {**BODY["parameters"], "adapter_id": adapter, "adapter_source": "local"}
    return {**BODY, "parameters": parameters}


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_adapters_are_loaded_and_pinned_before_it_is_ready(tmp_path, num_ranks):
    async def scene() -> None:
        shards = [fake_shard(rank=rank, world_size=num_ranks) for rank in range(num_ranks)]
        config = config_of(
            tmp_path,
            adapter_id="own",
            adapter_source="local",
            preloaded_adapter_ids=["one", "two"],
            preloaded_adapter_source="local",
            default_adapter_source="local",
        )
        async with serve(shards, tmp_path), started(config, tmp_path) as router:
            url = await router.url()
            for shard in shards:
                assert len(shard.prepared) == 3
            async with httpx.AsyncClient(base_url=url, timeout=30) as client:
                listed = (await client.get("/v1/adapters")).json()["adapters"]
                assert {(each["adapter_id"], each["state"], each["pinned"]) for each in listed} == {
                    (name, "resident", True) for name in ("own", "one", "two")
                }
                # Who names none gets the server's own; others are loaded as ever (W36).
                answers = [
                    (await client.post("/generate", json=sent))
                    for sent in (BODY, body("own"), body("one"), body("other"))
                ]
                ids = [each.json()["details"]["tokens"] for each in answers]
                assert ids[0] == ids[1] != ids[2]
                assert answers[0].headers["x-adapter-id"] == "own"
                assert answers[3].headers["x-adapter-id"] == "other"

    play(scene())


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"adapter_id": "bad"}, "adapter bad cannot be loaded: its peft_type is not served"),
        (
            {"preloaded_adapter_ids": ["good", "bad"]},
            "adapter bad cannot be loaded: its peft_type is not served",
        ),
        (
            {"adapter_aliases": ["poet=local:good", "bard=local:bad"]},
            "adapter bard cannot be loaded: its peft_type is not served",
        ),
        ({"adapter_id": "gone"}, "adapter gone cannot be loaded: no such folder"),
        ({"adapter_id": "huge"}, "--adapter-memory-fraction"),
        ({"adapter_id": "breaks"}, "adapter breaks cannot be loaded: it has NaN"),
        (
            {"preloaded_adapter_ids": ["a", "b"], "max_active_adapters": 2},
            "raise --max-active-adapters",
        ),
    ],
)
def test_one_that_cannot_be_loaded_ends_the_start_in_words(tmp_path, overrides, words):
    def fetch(query: AdapterQuery) -> Any:
        name = query.ref.id
        if name == "bad":
            raise refused("its peft_type is not served")
        if name == "gone":
            raise AdapterUnavailableError(Reason.NOT_FOUND, "no such folder")
        return fetched(name, device_bytes=1 << 40) if name == "huge" else fake_fetched(query)

    def prepare(handle: object, content: Any) -> None:
        if "breaks" in content.key:
            raise refused("it has NaN")

    async def scene() -> None:
        shard = fake_shard()
        shard.on_fetch, shard.on_prepare = fetch, prepare
        sources = {"adapter_source": "local", "preloaded_adapter_source": "local"}
        config = config_of(tmp_path, **sources, **overrides)
        async with serve([shard], tmp_path), started(config, tmp_path) as router:
            assert await router.url() == ""
            code, log = await router.ended()
            assert code == ExitCode.ADAPTER_UNUSABLE
            assert words in log[-1]["message"]
            assert log[-1]["hint"]

    play(scene())


def test_a_name_that_is_none_is_a_mistake_of_usage(tmp_path):
    async def scene() -> None:
        config = config_of(tmp_path, adapter_id="a\nb")
        async with serve([fake_shard()], tmp_path), started(config, tmp_path) as router:
            assert await router.url() == ""
            code, log = await router.ended()
            assert code == ExitCode.USAGE
            assert "control characters" in log[-1]["message"]

    play(scene())


def test_a_shard_that_dies_meanwhile_is_said_as_that(tmp_path):
    async def scene() -> None:
        shard = fake_shard()

        def prepare(handle: object, content: object) -> None:
            shard.die()
            shard._check(None)

        shard.on_prepare = prepare
        config = config_of(tmp_path, adapter_id="a", adapter_source="local")
        async with serve([shard], tmp_path), started(config, tmp_path) as router:
            assert await router.url() == ""
            code, _ = await router.ended()
            assert code == ExitCode.SHARD_UNREACHABLE

    play(scene())


def test_a_stop_while_an_adapter_is_fetched_ends_it(tmp_path):
    async def scene() -> None:
        shard = fake_shard()
        asked = asyncio.Event()

        async def fetch(query: AdapterQuery) -> Any:
            asked.set()
            return await asyncio.get_running_loop().create_future()

        shard.on_fetch = fetch
        config = config_of(tmp_path, adapter_id="a", adapter_source="local")
        async with serve([shard], tmp_path), started(config, tmp_path) as router:
            await asked.wait()
            router.process.send_signal(signal.SIGTERM)
            assert await router.url() == ""
            code, _ = await router.ended()
            assert code == ExitCode.INTERRUPTED

    play(scene())
