"""Every alert fires when its cause is made, and none before; dashboards speak of what a server tells."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
from tests.acceptance.faults.poison import overflowing
from tests.acceptance.faults.server import faulty_server, processes, until_healthy
from tests.acceptance.harness import Result
from tests.acceptance.look.prometheus import ROOT, RULES, Prometheus, programs, watching
from tests.helpers.default_model import default_model_dir
from tests.helpers.formula_adapters import write_formula_adapter
from tests.helpers.server import Server

KEY = "sk-look-at-alerts"
HEADERS = {"authorization": f"Bearer {KEY}"}
# Few rows, blocks and places, so that little is too much.
_OPTIONS = (
    "--max-batch-size", "2", "--num-blocks", "40", "--max-active-adapters", "1",
    "--max-queued-requests", "24", "--http-workers", "1", "--restarts", "30", "--prefix-caching", "off",
    "--speculative-tokens", "2", "--api-key", KEY,
)  # fmt: skip
_NAME = re.compile(r"(?:lorax_|vllm:)[a-z_:]+")
_QUIET_S, _PATIENCE_S = 25.0, 60.0


class Causes:
    """What makes each alert's reason true."""

    def __init__(self, server: Server, root: Path) -> None:
        self._server, self._root = server, root
        self._threads: list[threading.Thread] = []

    def by_alert(self) -> dict[str, Callable[[], None]]:
        """Return them in an order in which none disturbs the next one; the last ends the server."""
        return {
            "LoraxAdaptersFailing": self.ask_for_a_broken_adapter,
            "LoraxFailing": self.ask_for_no_numbers,
            "LoraxAdaptersTakingTurns": self.ask_for_many_adapters,
            "LoraxGivingWay": self.ask_for_more_than_the_cache_holds,
            "LoraxQueueLong": self.ask_for_too_much,
            "LoraxRefusing": self.ask_for_too_much,
            "LoraxFirstTokenSlow": self.ask_for_too_much,
            "LoraxBetweenTokensSlow": self.stop_shards_again_and_again,
            "LoraxStalled": self.stop_shards,
            "LoraxFrontsRestarted": self.kill_front,
            "LoraxShardsLost": self.kill_shards,
            "LoraxShardsLostOften": self.kill_shards_often,
            "LoraxDown": self.end,
        }

    def settle(self) -> None:
        """Wait for all requests to end."""
        for thread in self._threads:
            thread.join()
        self._threads.clear()

    # --- requests ---------------------------------------------------------------------

    def _ask(self, num: int, model: Callable[[int], str], num_tokens: int) -> None:
        """Let so many ask at once; whatever becomes of them."""

        def ask(number: int) -> None:
            body = {
                "model": model(number), "prompt": f"{number}: The sea is", "max_tokens": num_tokens,
                "ignore_eos": True, "temperature": 0.0,
            }  # fmt: skip
            with contextlib.suppress(httpx.HTTPError):
                httpx.post(
                    f"{self._server.url}/v1/completions", json=body, headers=HEADERS, timeout=300
                )

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(num)]
        for thread in threads:
            thread.start()
        self._threads += threads

    def ask_for_a_broken_adapter(self) -> None:
        folder = write_formula_adapter(default_model_dir(), self._root / "broken", rank=2, seed=9)
        (folder / "adapter_model.safetensors").write_bytes(b"none")
        self._ask(1, lambda _: str(folder), 1)

    def ask_for_no_numbers(self) -> None:
        adapter = overflowing(self._root)
        for _ in range(2):
            self._ask(1, lambda _: str(adapter), 4)
            self.settle()

    def ask_for_many_adapters(self) -> None:
        self._ask(12, lambda number: ("pirate", "sentiment", "json-only")[number % 3], 24)

    def ask_for_more_than_the_cache_holds(self) -> None:
        self._ask(4, lambda _: "base", 400)

    def ask_for_too_much(self) -> None:
        self._ask(60, lambda _: "base", 60)

    # --- processes --------------------------------------------------------------------

    def _signal(self, number: signal.Signals) -> None:
        for each in processes(self._server, "lorax-shard"):
            each.send_signal(number)

    def stop_shards_again_and_again(self) -> None:
        self._ask(2, lambda _: "base", 40)
        for _ in range(12):
            time.sleep(0.1)
            self._signal(signal.SIGSTOP)
            time.sleep(1.5)
            self._signal(signal.SIGCONT)

    def stop_shards(self) -> None:
        self._ask(2, lambda _: "base", 200)
        time.sleep(1.0)
        self._signal(signal.SIGSTOP)
        time.sleep(25.0)
        self._signal(signal.SIGCONT)

    def kill_front(self) -> None:
        (router,) = processes(self._server, "lorax-router")
        fronts = [each for each in router.children() if "fronts" in " ".join(each.cmdline())]
        _kill(fronts)

    def kill_shards(self) -> None:
        _kill(processes(self._server, "lorax-shard"))

    def kill_shards_often(self) -> None:
        for _ in range(4):
            until_healthy(self._server)
            self.kill_shards()
            time.sleep(1.0)

    def end(self) -> None:
        self._server.stop()


def _kill(found: list[psutil.Process]) -> None:
    assert found, "there is nobody to kill"
    for each in found:
        each.kill()


def expressions() -> list[str]:
    """Return all that dashboards and alerts ask for."""
    panels = json.loads((ROOT / "deploy/grafana/lorax.json").read_text())["panels"]
    asked = [target["expr"] for panel in panels for target in panel.get("targets", ())]
    return [*asked, *re.findall(r"expr: (.+(?:\n {10}\S.*)*)", RULES.read_text())]


def _unknown(server: Server) -> set[str]:
    """Return the series that are asked for and that the server does not tell."""
    text = httpx.get(f"{server.url}/metrics", headers=HEADERS, timeout=30).text
    told = set(re.findall(r"^((?:lorax_|vllm:)[a-z_:]+)", text, re.MULTILINE))
    return {name for each in expressions() for name in _NAME.findall(each)} - told


@contextlib.contextmanager
def _stage() -> Iterator[tuple[Server, Path]]:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name, "adapters")
        root.mkdir()
        options = ("--adapter-local-root", str(root), "--adapter-store-dir", f"{name}/store")
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with faulty_server(*_OPTIONS, *options, env=environment) as server:
            yield server, root


def point_alerts() -> Result:
    """Make one cause after the other while a Prometheus looks."""
    with (
        programs() as binaries,
        _stage() as (server, root),
        watching(binaries, server, KEY) as watcher,
    ):
        promtool = str(binaries / "promtool")
        rules = subprocess.run(
            [promtool, "check", "rules", str(RULES)], capture_output=True, text=True
        )
        causes = Causes(server, root)
        begun = time.perf_counter()
        time.sleep(_QUIET_S)
        early = watcher.fired(time.perf_counter() - begun)
        silent, unknown = [], set[str]()
        for name, cause in causes.by_alert().items():
            if name == "LoraxDown":
                unknown = _unknown(server)
            if not _fires(watcher, name, cause):
                silent.append(name)
            print(f"    {name}: {'silent' if name in silent else 'fired'}", flush=True)
            causes.settle()
    return _verdict(rules, early, silent, unknown, num=len(causes.by_alert()))


def _fires(watcher: Prometheus, name: str, cause: Callable[[], None]) -> bool:
    since = time.perf_counter()
    cause()
    return watcher.until_fired(name, since, _PATIENCE_S)


def _verdict(
    rules: subprocess.CompletedProcess[Any], early: set[str], silent: list[str], unknown: set[str],
    *, num: int,
) -> Result:  # fmt: skip
    ok = rules.returncode == 0 and not (early or silent or unknown)
    return Result(
        ok,
        f"promtool: {rules.stdout.split(':')[-1].strip() or rules.stderr[-200:]}; {num - len(silent)} of "
        f"{num} alerts fired; silent: {', '.join(silent) or 'none'}; without a cause: "
        f"{', '.join(sorted(early)) or 'none'}; series that are not there: "
        f"{', '.join(sorted(unknown)) or 'none'} of {len(expressions())} expressions",
    )
