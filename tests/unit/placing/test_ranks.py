"""Ranks on other machines: the plan that knows them, and who runs one."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from lorax_launcher.elsewhere import RANKS_VARIABLE, RanksElsewhere
from lorax_launcher.facts import DeviceFacts
from lorax_launcher.options import LauncherOptions, UsageError
from lorax_launcher.placing.ranks import host as rank_host
from lorax_launcher.placing.ranks.host import RankHost, RankNews
from lorax_launcher.placing.server import rank_options
from lorax_launcher.resolve import LaunchPlan, resolve

TWO = RanksElsewhere(
    uris=("10.0.0.1:5", "10.0.0.2:6"), programs={1: ("proxy", "x")}, tls_dir="/tls"
)
# A shard that says what it was told, and serves until it is told to end.
PLAYED = """
import json, os, sys, time
known = json.loads(open(sys.argv[3]).read())
print(json.dumps({"message": known["adapter_store_dir"]}), flush=True)
if known["model_dir"] == "/none":
    raise SystemExit(30)
os.write(known["ready_fd"], b'{"uri": "here"}\\n')
time.sleep(60)
"""


def plan_of(num_shard: int) -> LaunchPlan:
    facts = DeviceFacts(num_cores=8, memory_bytes=16 * 2**30)
    return resolve(LauncherOptions(num_shard=num_shard), facts, "/run/x")


def test_a_plan_knows_where_its_ranks_are(tmp_path: Path) -> None:
    path = tmp_path / "ranks"
    path.write_text(TWO.text)
    placed = RanksElsewhere.read(path)
    assert placed == TWO
    plan = placed.spread(plan_of(2))
    assert [shard.shard_uris for shard in plan.shards] == [["10.0.0.1:5", "10.0.0.2:6"]] * 2
    assert plan.router.shard_uri == "10.0.0.1:5"
    assert {plan.router.shard_tls_dir, *(each.shard_tls_dir for each in plan.shards)} == {"/tls"}
    with pytest.raises(UsageError, match="2 ranks have a place and 3 are asked for"):
        placed.spread(plan_of(3))


def test_a_launcher_is_told_where_ranks_meet(tmp_path: Path) -> None:
    options, variables = rank_options(["--x"], TWO, "127.0.0.1:77", tmp_path)
    assert options == [
        "--num-shard", "2", "--master-addr", "127.0.0.1", "--master-port", "77", "--x",
    ]  # fmt: skip
    assert variables["GLOO_SOCKET_IFNAME"] == "lo"
    assert RanksElsewhere.read(Path(variables[RANKS_VARIABLE])) == TWO
    _, variables = rank_options([], TWO, "[fd00::1]:77", tmp_path)
    assert "GLOO_SOCKET_IFNAME" not in variables


def played(folder: Path) -> dict[str, str]:
    """Variables with which a rank is a program of the test's."""
    package = folder / "played" / "lorax_shard"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "cli.py").write_text(PLAYED)
    return {"PYTHONPATH": os.pathsep.join([str(package.parent), os.environ.get("PYTHONPATH", "")])}


def config(**values: Any) -> str:
    return json.dumps(
        {"adapter_store_dir": "/launcher", "model_dir": "/m", "ready_fd": 99} | values
    )


async def told(host: RankHost, variables: dict[str, str], **values: Any) -> list[RankNews]:
    """All news up to the report or the end."""
    await host.start(config(**values), variables)
    found = [await host.news()]
    while found[-1].report is None and found[-1].code is None:
        found.append(await host.news())
    return found


def in_time(scene: Any) -> None:
    asyncio.run(asyncio.wait_for(scene, 60))


def test_a_rank_has_its_machines_store_and_its_launcher_hears_of_it(tmp_path: Path) -> None:
    variables = played(tmp_path)

    async def scene() -> None:
        host = RankHost(str(tmp_path / "stores"))
        for _ in range(2):
            # A new group begins: what runs makes room.
            found = await told(host, variables)
            (line,) = [line for news in found for line in news.lines]
            assert json.loads(line)["message"] == str(tmp_path / "stores" / "1" / "adapters")
            assert found[-1].report == {"uri": "here"}
        host.terminate()
        while (news := await host.news()).code is None:
            pass
        assert news.code == -signal.SIGTERM
        await host.close()

    in_time(scene())


def test_a_rank_that_cannot_start_ends_as_it_does(tmp_path: Path) -> None:
    variables = played(tmp_path)

    async def scene() -> None:
        host = RankHost(str(tmp_path))
        found = await told(host, variables, model_dir="/none")
        assert found[-1] == RankNews(found[-1].lines, None, 30)
        await host.close()

    in_time(scene())


def test_a_rank_nobody_asks_for_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = played(tmp_path)
    monkeypatch.setattr(rank_host, "_LEASE_S", 0.0)

    async def scene() -> None:
        host = RankHost(str(tmp_path))
        await told(host, variables)
        watching = asyncio.create_task(host.watch())
        while (await host.news()).code is None:
            await asyncio.sleep(1.5)
        watching.cancel()
        await host.close()

    in_time(scene())
