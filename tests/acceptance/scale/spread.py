"""A tensor-parallel group over two nodes of Ray, each with its own store of adapters."""

from __future__ import annotations

import sqlite3
import tempfile
from pathlib import Path

from tests.acceptance.faults.server import ALONE
from tests.acceptance.harness import Result
from tests.acceptance.scale import skewed
from tests.acceptance.scale.ray_nodes import LocalNodes, with_ray
from tests.helpers.default_model import default_model_dir
from tests.helpers.server import Server, free_port

NUM_ADAPTERS, NUM_TOKENS = 3, 12
SERVER = ("--device", "cpu", "--num-blocks", "800", "--max-active-adapters", "4", *ALONE)


def point_spread() -> Result:
    """What two nodes answer with adapters is what one server with two ranks answers."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name, "adapters")
        root.mkdir()
        names = (
            "",
            *skewed.write_adapters(default_model_dir(), root, "spread", NUM_ADAPTERS, 7000),
        )
        bodies = [skewed.body_of(each, number, NUM_TOKENS) for number, each in enumerate(names)]
        options = ("--adapter-local-root", str(root), *SERVER)
        with Server("--num-shard", "2", "--adapter-store-dir", f"{name}/alone", *options) as server:
            alone = skewed.send_at_once(server.url, bodies)
        heard, stores, nodes = _over_two_nodes(name, options, bodies)
    wrong = [number for number, (a, b) in enumerate(zip(heard, alone)) if a.error or a.ids != b.ids]
    for number in wrong:
        print(f"    {heard[number]}\n      one server {alone[number]}", flush=True)
    # What a node fetches it knows by name; what it reads from rank 0 by its digest alone.
    is_good = not wrong and nodes == 2 and stores == [(NUM_ADAPTERS,) * 2, (NUM_ADAPTERS, 0)]
    told = " and ".join(f"{num} of which {named} from their source" for num, named in stores)
    return Result(
        is_good,
        f"{len(heard) - len(wrong)} of {len(heard)} answers as one server's with two ranks, over {nodes} "
        f"nodes; adapters in the nodes' stores: {told}",
    )


def _over_two_nodes(
    name: str, options: tuple[str, ...], bodies: list[dict[str, object]]
) -> tuple[list[skewed.Answer], list[tuple[int, int]], int]:
    """Return the answers, what each store has, rank 0's first, and on how many nodes ranks ran."""
    with with_ray() as env, LocalNodes(env) as nodes:
        nodes.add()
        port = str(free_port())
        nodes.ask(
            "up", "--nodes", "2", "--port", port, "--store-dir", f"{name}/stores", "--", *options
        )
        heard = skewed.send_at_once(f"http://127.0.0.1:{port}", bodies)
        ranks = [
            sum(
                "lorax_shard.cli" in words or "lorax-shard" in words
                for words in _commands(nodes, number)
            )
            for number in range(2)
        ]
        nodes.ask("down")
    stores = [_num_stored(Path(name, "stores", str(number))) for number in (1, 2)]
    return heard, sorted(stores, reverse=True), sum(num > 0 for num in ranks)


def _commands(nodes: LocalNodes, number: int) -> list[str]:
    return [" ".join(each.cmdline()) for each in nodes.processes(number)]


def _num_stored(folder: Path) -> tuple[int, int]:
    """Return how many adapters a store has, and how many of them its node fetched itself."""
    with sqlite3.connect(folder / "adapters" / "index.sqlite3") as database:
        counts = [
            database.execute(f"SELECT COUNT(DISTINCT digest) FROM {table}").fetchone()[0]
            for table in ("entries", "names")
        ]
    database.close()
    return counts[0], counts[1]
