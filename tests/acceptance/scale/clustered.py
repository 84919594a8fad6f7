"""Three nodes of Ray, three replicas: loads, throughput, a node that is killed, and other numbers of replicas."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from tests.acceptance.faults.server import ALONE
from tests.acceptance.harness import Result
from tests.acceptance.scale import skewed
from tests.acceptance.scale.ray_nodes import LocalNodes, with_ray
from tests.helpers.default_model import default_model_dir
from tests.helpers.server import free_port

NUM_REPLICAS = 3
# What is enough: loads per adapter where all fit, of random routing's where not, of split traffic.
MOST_LOADS, MOST_OF_RANDOM, LEAST_OF_SPLIT = 1.3, 0.5, 0.9
# Requests of a skewed run, and what part of the two cores they take: while 24 adapters just fit,
# copies have no slots to spare (docs/scaling.md, "Small fleets").
FITTING, CROWDED = (150, 0.2), (400, 0.5)
NUM_TOKENS, NUM_CORES, RATE, LONGEST_S = 2, 2, 3.0, 120.0
ROUNDS, ROUND_S = 3, 12.0
NUM_STREAMS = 50
# Of them at work at the server whose node dies.
LEAST_KILLED = 3
SERVER = (
    "--device", "cpu", "--num-blocks", "1200", "--max-active-adapters", "8",
    "--adapter-cycle-time-s", "1", "--grace-period", "5", *ALONE,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Part:
    """One figure of the point."""

    ok: bool
    figure: str


@dataclass(frozen=True, slots=True)
class Scene:
    """What all parts use."""

    nodes: LocalNodes
    url: str
    model_dir: Path
    root: Path

    def adapters(self, name: str, num: int, seed: int) -> tuple[str, ...]:
        """Write adapters that no other part has."""
        return skewed.write_adapters(self.model_dir, self.root, name, num, seed)

    def metrics(self) -> list[str]:
        """Return where the metrics of all groups are."""
        return [each["metrics"] for each in self.nodes.status()["groups"]]


def point_ray() -> Result:
    """All of it in one cluster."""
    parts = []
    with _scene() as scene:
        for part in PARTS:
            begun = time.perf_counter()
            found = part(scene)
            print(
                f"    {part.__name__}: {found.figure} ({time.perf_counter() - begun:.0f} s)",
                flush=True,
            )
            parts.append(found)
        scene.nodes.ask("down")
    return Result(all(each.ok for each in parts), "; ".join(each.figure for each in parts))


@contextlib.contextmanager
def _scene() -> Iterator[Scene]:
    model_dir = default_model_dir()
    with (
        tempfile.TemporaryDirectory() as name, with_ray() as env, LocalNodes(env) as nodes,
    ):  # fmt: skip
        for _ in range(NUM_REPLICAS - 1):
            nodes.add()
        root = Path(name, "adapters")
        root.mkdir()
        port = free_port()
        nodes.ask(
            "up", "--replicas", str(NUM_REPLICAS), "--port", str(port), "--store-dir", f"{name}/stores",
            "--", "--adapter-local-root", str(root), *SERVER,
        )  # fmt: skip
        yield Scene(nodes, f"http://127.0.0.1:{port}", model_dir, root)


# --- loads ---------------------------------------------------------------------------------


def fitting(scene: Scene) -> Part:
    """24 adapters in 3 times 8 slots, a skewed run."""
    adapters = scene.adapters("fitting", 24, 1000)
    num, asked = _num_loads(scene, scene.url, _traffic(scene, adapters, *FITTING))
    per_adapter = num / asked
    return Part(
        per_adapter <= MOST_LOADS, f"24 adapters: {num} loads of {asked}, {per_adapter:.2f} each"
    )


def crowded(scene: Scene) -> Part:
    """40 adapters in 3 times 8 slots, by ours and by random routing."""
    ours = scene.adapters("ours", 40, 2000)
    num_ours, _ = _num_loads(scene, scene.url, _traffic(scene, ours, *CROWDED))
    theirs = scene.adapters("random", 40, 3000)
    with _random_ingress(scene) as url:
        num_random, _ = _num_loads(scene, url, _traffic(scene, theirs, *CROWDED))
    share = num_ours / max(num_random, 1)
    return Part(
        share <= MOST_OF_RANDOM,
        f"40 adapters: {num_ours} loads, random routing {num_random} ({share:.2f} of it)",
    )


def _traffic(scene: Scene, adapters: tuple[str, ...], num: int, share: float) -> skewed.Skew:
    """Return traffic that takes a part of the cores, by what a request takes now."""
    seconds = skewed.seconds_each(scene.url, NUM_TOKENS)
    # Where others compute, too, it is not waited for ever.
    rate = max(share * NUM_CORES / seconds, num / LONGEST_S)
    print(f"    a request takes {seconds:.2f} s: {rate:.1f} a second", flush=True)
    return skewed.Skew(adapters, rate, num / rate, NUM_TOKENS)


def _num_loads(scene: Scene, url: str, skew: skewed.Skew) -> tuple[int, int]:
    """Send traffic; return how many loads it took, and how many adapters it asked for."""
    before = skewed.loads(scene.metrics())
    answers = skewed.send(url, skew)
    _check(answers)
    after = skewed.loads(scene.metrics())
    print(
        f"    {len(answers)} requests, median {median(a.seconds for a in answers):.2f} s",
        flush=True,
    )
    return (after - before).total(), len({each.adapter for each in answers})


@contextlib.contextmanager
def _random_ingress(scene: Scene) -> Iterator[str]:
    places = [f"--replica={each['name']}={each['uri']}" for each in scene.nodes.status()["groups"]]
    words = [sys.executable, "-m", "tests.acceptance.scale.random_ingress", "--port=0", *places]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if (record := json.loads(line)).get("event") == "ready":
                    break
            threading.Thread(target=process.stdout.read, daemon=True).start()
            yield record["url"]
        finally:
            process.terminate()


# --- throughput ----------------------------------------------------------------------------


def throughput(scene: Scene) -> Part:
    """24 clients, each with its adapter: by the ingress, and split over the servers by hand."""
    adapters = scene.adapters("busy", 24, 4000)
    servers = [each["url"] for each in scene.nodes.status()["groups"]]
    skewed.tokens_per_s(servers, adapters, 6.0)
    split, routed, metrics = [], [], scene.metrics()
    for _ in range(ROUNDS):
        before = skewed.loads(metrics)
        split.append(skewed.tokens_per_s(servers, adapters, ROUND_S))
        between = skewed.loads(metrics)
        routed.append(skewed.tokens_per_s([scene.url], adapters, ROUND_S))
        num_split, num_routed = between - before, skewed.loads(metrics) - between
        print(f"    loads: split {num_split.total()}, routed {num_routed.total()}", flush=True)
    share = sum(routed) / sum(split)
    rounds = ", ".join(f"{ours:.0f} of {theirs:.0f}" for ours, theirs in zip(routed, split))
    return Part(share >= LEAST_OF_SPLIT, f"{share:.2f} of split traffic's tokens/s ({rounds})")


# --- a node dies ---------------------------------------------------------------------------


def killed(scene: Scene) -> Part:
    """50 streams, and the machine of one replica loses its power."""
    names = ("", *scene.adapters("streams", 11, 5000))
    bodies = [
        skewed.body_of(names[number % len(names)], number, 40) for number in range(NUM_STREAMS)
    ]
    alone = skewed.send_at_once(scene.url, bodies)
    _check(alone)
    # On the head's node are the ingress and all of Ray's own.
    nodes = [(_node_of(scene, each), each) for each in scene.nodes.status()["groups"]]
    number, group = max(nodes, key=lambda each: each[0])
    harm = threading.Thread(target=_kill_at_work, args=(scene, number, group["url"]))
    harm.start()
    heard = skewed.send_at_once(scene.url, bodies)
    harm.join()
    wrong = [n for n, (a, b) in enumerate(zip(heard, alone)) if (a.ids, a.text) != (b.ids, b.text)]
    for each in wrong[:3]:
        print(f"    {each}: {heard[each]}\n      undisturbed {alone[each]}", flush=True)
    resumed = _sample(scene.url, "lorax_ingress_resumed_total")
    begun = time.perf_counter()
    scene.nodes.add()
    found = scene.nodes.until_ready(NUM_REPLICAS, group["name"])
    back = f"a new node has {found['groups'][-1]['name']} after {time.perf_counter() - begun:.0f} s"
    failed = [each for each in heard if each.error]
    return Part(
        not wrong and not failed and resumed >= 1,
        f"{group['name']}'s node killed: {NUM_STREAMS - len(failed)} of {NUM_STREAMS} streams whole, "
        f"{NUM_STREAMS - len(wrong)} as undisturbed, {resumed:.0f} moved; {back}",
    )


def _kill_at_work(scene: Scene, number: int, url: str) -> None:
    """End a node once its server has streams on their way."""
    latest = time.monotonic() + 20.0
    while _sample(url, "lorax_requests_running") < LEAST_KILLED and time.monotonic() < latest:
        time.sleep(0.02)
    time.sleep(0.2)
    scene.nodes.kill(number)


def _node_of(scene: Scene, group: dict[str, Any]) -> int:
    """Return the node on which a group is, by who listens at its address."""
    port = int(group["uri"].rpartition(":")[2])
    pid = next(
        each.pid for each in psutil.net_connections("tcp")
        if each.status == psutil.CONN_LISTEN and each.laddr.port == port and each.pid is not None
    )  # fmt: skip
    return scene.nodes.number_of(pid)


def _sample(url: str, name: str) -> float:
    async def scene() -> str:
        async with skewed.client(url) as http:
            return (await http.get("/metrics")).text

    lines = asyncio.run(scene()).splitlines()
    return sum(float(each.rsplit(" ", 1)[1]) for each in lines if each.startswith(name))


# --- other numbers of replicas ----------------------------------------------------------------


def scaled(scene: Scene) -> Part:
    """1, 3 and 1 replicas again, while requests come."""
    names = ("", *scene.adapters("scaled", 3, 6000))
    scene.nodes.ask("scale", "1")
    stopping, answers = threading.Event(), []

    def load() -> None:
        seed = 0
        while not stopping.is_set():
            seed += 1
            answers.extend(skewed.send(scene.url, skewed.Skew(names, RATE, 10.0, 16, seed)))

    loading = threading.Thread(target=load)
    loading.start()
    try:
        for num in (NUM_REPLICAS, 1):
            scene.nodes.ask("scale", str(num))
            time.sleep(5.0)
    finally:
        stopping.set()
        loading.join()
    failed = [each for each in answers if each.error]
    for each in failed[:3]:
        print(f"    {each}", flush=True)
    num_left = len(scene.nodes.status()["groups"])
    return Part(
        not failed and num_left == 1,
        f"1, 3, 1 replicas: {len(failed)} of {len(answers)} requests failed",
    )


PARTS = (fitting, crowded, throughput, killed, scaled)


def _check(answers: Sequence[skewed.Answer]) -> None:
    if failed := [each for each in answers if each.error]:
        raise RuntimeError(f"{len(failed)} of {len(answers)} requests failed: {failed[0]}")
