"""A device that computes nothing any more: the shard ends and says so, whatever rows it had."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.helpers.in_loop import in_loop
from tests.helpers.plans import make_plan, make_spec

from lorax_contract.config import ShardConfig
from lorax_contract.errors import ShardError, ShardUnavailableError
from lorax_contract.exit_codes import ExitCode
from lorax_router.shards.grpc_client import GrpcShardClient


@pytest.fixture
def shard(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    config = ShardConfig(model_dir="", model_id="toy", shard_uris=[uri_in(tmp_path)])
    (tmp_path / "shard.json").write_text(config.to_json())
    command = [sys.executable, "-m", "tests.helpers.shard_with_broken_device"]
    process = subprocess.Popen(
        [*command, str(tmp_path / "shard.json")],
        cwd=Path(__file__).parents[2], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    yield process
    process.kill()
    process.communicate()


def uri_in(folder: Path) -> str:
    return f"unix:{folder}/shard"


@in_loop
async def break_it(shard: subprocess.Popen[str], uri: str) -> None:
    client = GrpcShardClient(uri)
    while True:
        try:
            await client.health()
            break
        except ShardUnavailableError:
            assert shard.poll() is None, shard.communicate()
            await asyncio.sleep(0.1)
    rows = [make_spec(number, max_new_tokens=9) for number in (1, 2, 3)]
    work = [(number, 3, [number]) for number in (1, 2, 3)]
    # Any of them may be to blame, until one is alone.
    outcome = await client.step(make_plan(1, work, rows))
    assert outcome.failed == [1, 2, 3]
    with pytest.raises(ShardUnavailableError, match="the device fails at the smallest step"):
        await client.step(make_plan(2, work[:1], rows[:1], drop=[1]))
    # Nobody takes it for healthy meanwhile.
    with pytest.raises(ShardError):
        await client.health()
    await client.close()


def test_a_device_that_broke_ends_the_shard_in_words(
    shard: subprocess.Popen[str], tmp_path: Path
) -> None:
    break_it(shard, uri_in(tmp_path))
    output, _ = shard.communicate(timeout=60)
    assert shard.returncode == ExitCode.DEVICE_BROKEN
    (line,) = [line for line in output.splitlines() if "device_broken" in line]
    assert "illegal memory access" in line
    assert f'"exit_code": {int(ExitCode.DEVICE_BROKEN)}' in line
