"""Run it: ``python -m tests.soak --minutes 10 --seed 1``."""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from tests.acceptance.faults.crowd import converse
from tests.acceptance.faults.server import events, faulty_server, until_healthy
from tests.helpers.classifier_folders import save_classifiers
from tests.helpers.default_model import default_model_dir
from tests.helpers.server import Server
from tests.soak.clients import Clients
from tests.soak.disk import SmallDisk
from tests.soak.harm import Harm
from tests.soak.requests import ADMIN_KEY, KEYS, NUM_CLASSIFIERS, fixed_requests
from tests.soak.watch import PROGRAMS, Series, left_behind, sampled, watch

NUM_CLIENTS = 12
# Of the time, with processes that are killed.
_STORM = 0.6
# Of the store, which may hold 50 of them.
_DISK_MIB = 80
# Until what a start leaves is there, and caches are full.
_SETTLE = 0.25
_ADAPTER_PAUSE_S, _PROCESS_PAUSE_S = 4.0, 25.0
# What may grow while nothing is killed: allocators and caches breathe.
MOST_GROWN = {"lorax-router": 24.0, "lorax-shard": 64.0}
MOST_FILES = 24


def _write_keys(folder: Path) -> str:
    tenants = [
        f'[tenants.t{number}]\nkeys = ["{key}"]\npins = 1\n' for number, key in enumerate(KEYS)
    ]
    operator = f'[tenants.chief]\nkeys = ["{ADMIN_KEY}"]\nadmin = true\n'
    path = folder / "keys.toml"
    path.write_text("\n".join([*tenants, operator]))
    path.chmod(0o600)
    return str(path)


def _server(folder: Path, disk: SmallDisk | None, root: Path) -> Server:
    """Return a server whose store of adapters holds a few of them."""
    return faulty_server(
        "--api-keys-file", _write_keys(folder), "--adapter-local-root", str(root),
        "--adapter-store-dir", str(folder / "store"), "--adapter-store-gb", "0.05",
        "--adapter-registry", str(folder / "registry"), "--adapter-refresh-s", "2",
        "--restarts", "20",
        # Caches that are full soon: what grows after that is none.
        "--num-blocks", "256", "--adapter-host-memory-gb", "0.05", "--max-active-adapters", "12",
        # Clients have cores to themselves.
        env=os.environ | {"OMP_NUM_THREADS": "1"}, prefix=disk.prefix if disk else (),
    )  # fmt: skip


async def _storm(clients: Clients, harm: Harm, seconds: float, seed: int) -> None:
    until = time.perf_counter() + seconds
    await asyncio.gather(
        clients.run(NUM_CLIENTS, seed, until),
        harm.play(harm.adapters, _ADAPTER_PAUSE_S, seconds),
        harm.play(harm.processes, _PROCESS_PAUSE_S, seconds - _PROCESS_PAUSE_S),
    )


async def _calm(
    server: Server, clients: Clients, harm: Harm, seconds: float, seed: int
) -> dict[str, Series]:
    until = time.perf_counter() + seconds

    async def look() -> dict[str, Series]:
        await asyncio.sleep(_SETTLE * seconds)
        return await watch(server, (1 - _SETTLE) * seconds)

    _, _, series = await asyncio.gather(
        clients.run(NUM_CLIENTS, seed, until),
        harm.play(harm.adapters, _ADAPTER_PAUSE_S, seconds),
        look(),
    )
    return series


def soak(minutes: float, seed: int) -> list[str]:
    """Return what was found, in words; nothing: all held."""
    seconds = 60 * minutes
    with tempfile.TemporaryDirectory() as name:
        folder, root = Path(name), Path(name) / "adapters"
        root.mkdir()
        save_classifiers(default_model_dir(), root, NUM_CLASSIFIERS, ("q_proj", "v_proj"))
        disk: SmallDisk | None = SmallDisk(folder / "store", _DISK_MIB)
        if disk is not None and not disk.can_be_made:
            print("the store's disk is not filled: nobody may mount a file system here")
            disk = None
        with _server(folder, disk, root) as server:
            asks = fixed_requests()
            heads = {"authorization": f"Bearer {KEYS[0]}"}
            right = converse(server.url, [ask.body for ask in asks], headers=heads)
            if errors := [each.error for each in right if each.error]:
                return [f"undisturbed, a request fails: {errors[0]}"]
            names: list[str] = []
            harm = Harm(server, disk, root, names, random.Random(seed))
            clients = Clients(server.url, list(zip(asks, right)), names, {"cut", "503"})
            asyncio.run(_storm(clients, harm, _STORM * seconds, seed))
            until_healthy(server)
            clients.explained = set()
            files = {program: sampled(server, program)[1] for program in PROGRAMS}
            series = asyncio.run(_calm(server, clients, harm, (1 - _STORM) * seconds, seed + 1))
            harm.let_go()
            time.sleep(8)
            faults = _faults(server, clients, series, files)
            faults += left_behind(server)
            _tell(server, clients, harm, series)
            if (code := server.stop()) != 0:
                faults.append(f"the launcher ended with {code}")
    return faults


def _faults(
    server: Server, clients: Clients, series: dict[str, Series], files: dict[str, int]
) -> list[str]:
    tally = clients.tally
    faults = [f"wrong: {each[:600]}" for each in tally.wrong[:5]]
    if len(tally.wrong) > 5:
        faults.append(f"and {len(tally.wrong) - 5} more are wrong")
    if tally.sent != tally.ended:
        faults.append(f"{tally.sent} requests were sent, {tally.ended} have ended")
    for program, each in series.items():
        grown = each.slope() * each.seconds[-1] / 60
        if grown > MOST_GROWN[program]:
            faults.append(f"{program} has grown by {grown:.0f} MiB in {each.seconds[-1]:.0f} s")
        more = sampled(server, program)[1] - files[program]
        if more > MOST_FILES:
            faults.append(f"{program} has {more} files more open than before")
    return faults


def _tell(server: Server, clients: Clients, harm: Harm, series: dict[str, Series]) -> None:
    tally = clients.tally
    print(
        f"requests: {tally.sent}, ends: {dict(tally.ends)}; longest pause {tally.worst_gap_s:.1f} s"
    )
    print(
        f"done to it: {dict(harm.done)}; shards came back {len(events(server, 'shards_back'))} times"
    )
    for program, each in series.items():
        print(
            f"{program}: {each.mib[0]:.0f} to {each.mib[-1]:.0f} MiB, {each.slope():+.1f} MiB a minute; "
            f"{each.files[0]} to {each.files[-1]} files"
        )


def main() -> int:
    """Run, print what was found, and return 1 if that is anything."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    # Its servers end with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    faults = soak(given.minutes, given.seed)
    print("\n".join(faults) or "nothing found")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
