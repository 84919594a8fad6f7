"""A live router records what enters its scheduler; offline the same plans come of it."""

from __future__ import annotations

import asyncio
import gzip
import random
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.helpers.fake_shard_server import serve
from tests.helpers.router_process import config_of, started

from lorax_contract.config import SCHEDULING_POLICIES
from lorax_contract.exit_codes import ExitCode
from lorax_router.event_log.replay import replay
from lorax_router.shards.fake.shard import FakeModel, FakeShard

# Steps that the longest of the requests takes alone, whatever runs beside it.
NUM_STEPS = 40
# Words that no length, time or id reads like.
SECRET_WORDS = [f"w{number}" for number in range(100, 900)]


def live_shard() -> FakeShard:
    """A shard of few blocks; adapters are what their names say."""
    model = FakeModel(vocab_size=900, eos_token_ids=frozenset())
    return FakeShard(model, num_blocks=40, block_size=4, step_delay_s=0.002)


async def ask(client: httpx.AsyncClient, number: int) -> None:
    """Send one of many requests: of several lengths, adapters and tenants; some leave early."""
    draw = random.Random(number)
    shared = SECRET_WORDS[: draw.choice([0, 8, 16])]
    prompt = shared + draw.sample(SECRET_WORDS, draw.randint(1, 12))
    parameters: dict[str, Any] = {
        "max_new_tokens": draw.choice([1, 5, NUM_STEPS]), "ignore_eos_token": True, "priority": draw.randrange(3),
    }  # fmt: skip
    if adapter := draw.choice(["", "", "a", "b", "c", "d"]):
        parameters |= {"adapter_id": adapter, "adapter_source": "local"}
    body = {"inputs": " ".join(prompt), "parameters": parameters}
    await asyncio.sleep(draw.random() / 2)
    async with client.stream("POST", "/generate_stream", json=body) as stream:
        async for _ in stream.aiter_lines():
            if draw.random() < 0.01:
                return


async def live_run(
    folder: Path, policy: str, *, end: signal.Signals = signal.SIGTERM, num: int = 40
) -> Path:
    """Serve a crowd, and return what was recorded."""
    path = folder / "events"
    config = config_of(
        folder, record_events=str(path), scheduling_policy=policy, max_batch_size=6,
        max_batch_prefill_tokens=16, max_active_adapters=2, adapter_cycle_time_s=0.05,
    )  # fmt: skip
    async with serve([live_shard()], folder), started(config, folder) as router:
        async with httpx.AsyncClient(base_url=await router.url(), timeout=60) as client:
            await asyncio.gather(*(ask(client, number) for number in range(num)))
        router.process.send_signal(end)
        code, _ = await router.ended()
        assert code == (ExitCode.OK if end == signal.SIGTERM else -end)
    return path


def record(folder: Path, policy: str, **options: Any) -> Path:
    return asyncio.run(asyncio.wait_for(live_run(folder, policy, **options), 100))


@pytest.mark.parametrize("policy", SCHEDULING_POLICIES)
def test_what_was_recorded_live_gives_the_same_plans(tmp_path: Path, policy: str) -> None:
    """Adapters that take turns, prompts that begin alike, rows that give way, clients that leave."""
    path = record(tmp_path, policy)
    replayed = replay(path)
    assert replayed.difference == ""
    assert replayed.end == "closed"
    assert replayed.num_plans >= NUM_STEPS
    text = gzip.decompress(path.read_bytes()).decode()
    for call in ("submit", "cancel", "apply", "adapter_event", "adapters.add"):
        assert f'"call":"{call}"' in text
    assert not any(f'"{word}"' in text or f" {word} " in text for word in SECRET_WORDS)
    # Some prompts were in the cache, and offline they are as well.
    assert '"num_cached":8' in text or '"num_cached":12' in text or '"num_cached":16' in text


def test_what_a_killed_router_recorded_is_replayed(tmp_path: Path) -> None:
    """As far as it was written: what the last moment brought may be lost."""
    path = record(tmp_path, "fair", end=signal.SIGKILL)
    replayed = replay(path)
    assert (replayed.difference, replayed.end) == ("", None)
    assert replayed.num_plans >= NUM_STEPS // 2


def test_a_file_that_cannot_be_written_is_told_at_the_start(tmp_path: Path) -> None:
    """Before anybody is served without the record that was asked for."""

    async def scene() -> None:
        config = config_of(tmp_path, record_events=str(tmp_path / "absent" / "events"))
        async with serve([live_shard()], tmp_path), started(config, tmp_path) as router:
            code, log = await router.ended()
            assert code == ExitCode.BAD_CONFIG
            assert any("--record-events" in line["message"] for line in log)

    asyncio.run(asyncio.wait_for(scene(), 60))
