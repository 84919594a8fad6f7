"""Two ingresses at one port over a local cluster of Ray: what is managed at either, and one that is killed."""

from __future__ import annotations

import contextlib
import re
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
from tests.acceptance.faults.server import ALONE
from tests.acceptance.harness import Result
from tests.acceptance.scale import skewed
from tests.acceptance.scale.ray_nodes import LocalNodes, with_ray
from tests.helpers.default_model import default_model_dir
from tests.helpers.server import free_port

NUM_REPLICAS = NUM_INGRESSES = 2
NUM_ASKED, NUM_STREAMS, STREAM_TOKENS = 24, 16, 40
# Rounds in which one ingress is told to load an adapter and the other one to unload it, at once.
ROUNDS = 8
KEY = "the-operator-s-key"
SERVER = (
    "--device", "cpu", "--num-blocks", "800", "--max-active-adapters", "6", "--grace-period", "5",
    "--adapter-source", "local", "--admin-api-key", KEY, *ALONE,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Scene:
    """What all parts use."""

    nodes: LocalNodes
    url: str
    adapters: tuple[str, ...]

    def ingresses(self) -> dict[str, int]:
        """Return the process of each ingress, by the address of its own metrics."""
        found = self.nodes.status()["ingresses"]
        return {each["metrics"]: _listener(_port(each["metrics"])) for each in found}

    def servers(self) -> list[str]:
        """Return the addresses of the servers themselves."""
        return [each["url"] for each in self.nodes.status()["groups"]]

    @contextlib.contextmanager
    def door(self, pid: int) -> Iterator[httpx.Client]:
        """Connect, until the system has given the connection to a certain ingress."""
        headers = {"authorization": f"Bearer {KEY}"}
        limits = httpx.Limits(keepalive_expiry=None)
        until = time.monotonic() + 20
        while time.monotonic() < until:
            with httpx.Client(
                base_url=self.url, timeout=60, headers=headers, limits=limits
            ) as http:
                if _has_connection(http, pid, _port(self.url)):
                    yield http
                    return
        raise RuntimeError(f"no connection came to the ingress of process {pid}")


def point_several() -> Result:
    """All of it in one cluster."""
    found = []
    with _scene() as scene:
        for part in (both, managed, opposite, killed):
            begun = time.perf_counter()
            found.append(part(scene))
            print(f"    {found[-1]} ({time.perf_counter() - begun:.0f} s)", flush=True)
        scene.nodes.ask("down")
    return Result(True, "; ".join(found))


@contextlib.contextmanager
def _scene() -> Iterator[Scene]:
    with (
        tempfile.TemporaryDirectory() as name, with_ray() as env, LocalNodes(env) as nodes,
    ):  # fmt: skip
        nodes.add()
        root = Path(name, "adapters")
        root.mkdir()
        adapters = skewed.write_adapters(default_model_dir(), root, "several", 3, 8000)
        port = free_port()
        nodes.ask(
            "up", "--replicas", str(NUM_REPLICAS), "--ingresses", str(NUM_INGRESSES),
            "--port", str(port), "--store-dir", f"{name}/stores",
            "--", "--adapter-local-root", str(root), *SERVER,
        )  # fmt: skip
        yield Scene(nodes, f"http://127.0.0.1:{port}", adapters)


# --- requests through both ---------------------------------------------------------------------


def both(scene: Scene) -> str:
    """Requests on connections of their own come to both, and all are answered."""
    for number in range(NUM_ASKED):
        _check(_asked(scene, number))
    counts = [_routed(metrics) for metrics in scene.ingresses()]
    assert min(counts) > 0, f"one ingress had none of the requests: {counts}"
    assert sum(counts) == NUM_ASKED, f"{NUM_ASKED} were sent, {counts} were routed"
    return f"{NUM_ASKED} requests, {counts[0]:.0f} and {counts[1]:.0f} of them through each"


def _asked(scene: Scene, number: int, adapter: str = "", tokens: int = 2) -> skewed.Answer:
    (answer,) = skewed.send_at_once(scene.url, [skewed.body_of(adapter, 4 * number, tokens)])
    return answer


# --- what is managed ---------------------------------------------------------------------------


def managed(scene: Scene) -> str:
    """What is named, pinned and unloaded at one is so at the other, and at both servers."""
    poet, kept, _ = scene.adapters
    one, other = scene.ingresses().values()
    with scene.door(one) as first, scene.door(other) as second:
        _post(first, "/v1/load_lora_adapter", lora_name="bard", lora_path=f"local:{poet}")
        _post(first, "/v1/adapters/load", adapter_id=kept, adapter_source="local", pin=True)
        listed = _listed(second)
        assert listed["bard"]["state"] == "resident", listed
        assert listed[kept]["pinned"], listed
        texts = [_text(http, "bard") for http in (first, second)]
        assert texts == [_text(second, poet)] * 2, texts
        _post(second, "/v1/unload_lora_adapter", lora_name="bard")
        _post(second, "/v1/adapters/unpin", adapter_id=kept, adapter_source="local")
        _post(second, "/v1/adapters/unload", adapter_id=kept, adapter_source="local")
        assert _generated(first, "bard").status_code != 200
        for url in ("", *scene.servers()):
            listed = _listed(first, url)
            assert not {"bard", kept} & listed.keys(), (url, listed)
    return "a name and a pin given at one held at the other, and were taken back there"


def opposite(scene: Scene) -> str:
    """Of calls that contradict each other in one moment the same one is the last for both servers."""
    _, _, name = scene.adapters
    body = {"adapter_id": name, "adapter_source": "local"}
    states, slowest, servers = [], 0.0, scene.servers()
    one, other = scene.ingresses().values()
    with ThreadPoolExecutor(2) as threads:
        for number in range(ROUNDS):
            words = ("load", "unload") if number % 2 else ("unload", "load")
            with scene.door(one) as first, scene.door(other) as second:
                calls = [
                    threads.submit(http.post, f"/v1/adapters/{word}", json=body)
                    for http, word in zip((first, second), words, strict=True)
                ]
                codes = {each.result().status_code for each in calls}
                assert codes <= {200, 404}, codes
                begun = time.perf_counter()
                states.append(_agreed(first, servers, name))
                slowest = max(slowest, time.perf_counter() - begun)
    return (
        f"{ROUNDS} times loaded and unloaded at once: both servers agreed each time, after "
        f"{slowest:.1f} s at most ({states.count(True)} times it was there)"
    )


def _agreed(http: httpx.Client, servers: list[str], name: str, timeout_s: float = 20.0) -> bool:
    """Wait until all servers say the same of an adapter; returns whether it is there."""
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        there = {name in _listed(http, url) for url in servers}
        if len(there) == 1:
            return there.pop()
        time.sleep(0.2)
    raise AssertionError(f"after {timeout_s:g} s servers say different things of {name}")


def _post(http: httpx.Client, path: str, **body: Any) -> None:
    answer = http.post(path, json=body)
    assert answer.status_code == 200, f"{path} {body}: {answer.status_code} {answer.text[:300]}"


def _listed(http: httpx.Client, url: str = "") -> Mapping[str, Any]:
    answer = http.get(f"{url}/v1/adapters")
    answer.raise_for_status()
    return {each["adapter_id"]: each for each in answer.json()["adapters"]}


def _generated(http: httpx.Client, adapter: str) -> httpx.Response:
    parameters = {"max_new_tokens": 6, "ignore_eos_token": True, "adapter_id": adapter}
    return http.post("/generate", json={"inputs": "Once", "parameters": parameters})


def _text(http: httpx.Client, adapter: str) -> str:
    answer = _generated(http, adapter)
    assert answer.status_code == 200, f"{adapter}: {answer.text[:300]}"
    return str(answer.json()["generated_text"])


# --- one that is killed ------------------------------------------------------------------------


def killed(scene: Scene) -> str:
    """Streams through the other one go on as undisturbed, and new requests come there."""
    names = ("", *scene.adapters)
    bodies = [
        skewed.body_of(names[number % len(names)], number, STREAM_TOKENS)
        for number in range(NUM_STREAMS)
    ]
    alone = skewed.send_at_once(scene.url, bodies)
    for each in alone:
        _check(each)
    ingresses = scene.ingresses()
    victim, pid = next(iter(ingresses.items()))
    before = {metrics: _routed(metrics) for metrics in ingresses}
    heard: list[skewed.Answer] = []
    reading = threading.Thread(target=lambda: heard.extend(skewed.send_at_once(scene.url, bodies)))
    reading.start()
    begun = lambda: {each: _routed(each) - before[each] for each in ingresses}  # noqa: E731
    _until(lambda: sum(begun().values()) == NUM_STREAMS, "all streams have begun")
    num_own = int(begun()[victim])
    process = psutil.Process(pid)
    process.kill()
    process.wait(20)
    while_reading = [_asked(scene, number) for number in range(4)]
    reading.join()
    for each in while_reading:
        _check(each)
    broken = [number for number, each in enumerate(heard) if each.error]
    wrong = [n for n, each in enumerate(heard) if n not in broken and each.ids != alone[n].ids]
    assert not wrong, f"other tokens than undisturbed: {heard[wrong[0]]}, not {alone[wrong[0]]}"
    assert len(broken) == num_own, f"{num_own} streams were its own, {len(broken)} broke"
    back_s = _back(scene, victim)
    return (
        f"one ingress killed under {NUM_STREAMS} streams: its own {num_own} broke, "
        f"{NUM_STREAMS - num_own} were as undisturbed, {len(while_reading)} new requests were "
        f"answered; it was back after {back_s:.0f} s"
    )


def _back(scene: Scene, victim: str) -> float:
    """Return the seconds until there are as many ingresses as were, and each has requests."""
    begun = time.perf_counter()

    def are_there() -> bool:
        found = [each["metrics"] for each in scene.nodes.status()["ingresses"]]
        return all(found) and victim not in found and len(found) == NUM_INGRESSES

    _until(are_there, "the ingress is back")
    seconds = time.perf_counter() - begun
    for pid in scene.ingresses().values():
        with scene.door(pid) as http:
            assert _text(http, scene.adapters[0])
    return seconds


# --- connections and counts --------------------------------------------------------------------


def _check(answer: skewed.Answer) -> None:
    assert not answer.error, answer.error


def _until(condition: Callable[[], bool], what: str, timeout_s: float = 60.0) -> None:
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until, f"after {timeout_s:g} s not yet: {what}"
        time.sleep(0.1)


def _routed(metrics: str) -> float:
    """Return how many requests an ingress has sent to servers."""
    with urllib.request.urlopen(metrics, timeout=20) as answer:
        text = answer.read().decode()
    found = re.findall(r"^lorax_ingress_routed_total\S* (\S+)$", text, re.MULTILINE)
    return sum(map(float, found))


def _port(url: str) -> int:
    port = httpx.URL(url).port
    assert port is not None
    return port


def _listener(port: int) -> int:
    """Return the process that listens at a port that it shares with nobody."""
    return next(
        each.pid for each in psutil.net_connections("tcp")
        if each.status == psutil.CONN_LISTEN and each.laddr.port == port and each.pid is not None
    )  # fmt: skip


def _has_connection(http: httpx.Client, pid: int, port: int) -> bool:
    """Whether a client's connection leads to a process; it is open then, for what comes next."""
    with http.stream("GET", "/health") as answer:
        own = answer.extensions["network_stream"].get_extra_info("client_addr")
        answer.read()
    return any(
        each.pid == pid and each.laddr.port == port and each.raddr and each.raddr.port == own[1]
        for each in psutil.net_connections("tcp")
    )
