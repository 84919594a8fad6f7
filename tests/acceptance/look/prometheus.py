"""A Prometheus that looks every second, with alerts that need no patience."""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import yaml
from tests.helpers.server import Server, free_port

ROOT = Path(__file__).parents[3]
RULES = ROOT / "deploy" / "prometheus" / "alerts.yml"
# Windows and patience of the alerts, and what they are here: all causes come within minutes.
_WINDOWS = {"2m": "15s", "5m": "20s", "15m": "20s", "1h": "240s"}
_FOR = "2s"


@contextlib.contextmanager
def programs() -> Iterator[Path]:
    """Give the folder of prometheus and promtool: this machine's, or those of Debian's package."""
    if (found := shutil.which("promtool")) is not None:
        yield Path(found).parent
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        subprocess.run(["apt-get", "download", "-q", "prometheus"], cwd=folder, check=True,
                       capture_output=True)  # fmt: skip
        (package,) = folder.glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", str(package), name], check=True)
        yield folder / "usr" / "bin"


def impatient(text: str) -> dict[str, Any]:
    """Return the alerts with short windows, and true after a moment."""
    document: dict[str, Any] = yaml.safe_load(text)
    for rule in document["groups"][0]["rules"]:
        rule["expr"] = re.sub(r"\[(\w+)\]", lambda found: f"[{_WINDOWS[found[1]]}]", rule["expr"])
        if "for" in rule:
            rule["for"] = _FOR
    return document


class Prometheus:
    """One that scrapes a server and evaluates its alerts."""

    def __init__(self, folder: Path, url: str) -> None:
        self._http = httpx.Client(base_url=url, timeout=10)
        self.folder = folder

    def ask(self, expression: str) -> list[dict[str, Any]]:
        """Return the series of an expression now."""
        answer = self._http.get("/api/v1/query", params={"query": expression})
        answer.raise_for_status()
        return list(answer.json()["data"]["result"])

    def fired(self, seconds: float) -> set[str]:
        """Return the alerts that have fired within so many seconds."""
        found = self.ask(f'max_over_time(ALERTS{{alertstate="firing"}}[{max(1, round(seconds))}s])')
        return {each["metric"]["alertname"] for each in found}

    def until_fired(self, name: str, since: float, timeout_s: float) -> bool:
        """Wait until an alert has fired since a moment of ``perf_counter``."""
        end = time.perf_counter() + timeout_s
        while time.perf_counter() < end:
            if name in self.fired(time.perf_counter() - since):
                return True
            time.sleep(0.5)
        return False


@contextlib.contextmanager
def watching(binaries: Path, server: Server, key: str) -> Iterator[Prometheus]:
    """Let a Prometheus look at a server, with a key."""
    with tempfile.TemporaryDirectory() as name:
        folder, port = Path(name), free_port()
        (folder / "alerts.yml").write_text(yaml.safe_dump(impatient(RULES.read_text())))
        target = {"targets": [f"127.0.0.1:{server.port}"]}
        (folder / "prometheus.yml").write_text(yaml.safe_dump({
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s", "scrape_timeout": "1s"},
            "rule_files": ["alerts.yml"],
            "scrape_configs": [
                {
                    "job_name": "lorax", "static_configs": [target],
                    "authorization": {"credentials": key},
                }
            ],
        }))  # fmt: skip
        process = subprocess.Popen(
            [
                str(binaries / "prometheus"), f"--config.file={folder}/prometheus.yml",
                f"--storage.tsdb.path={folder}/data", f"--web.listen-address=127.0.0.1:{port}",
                "--log.level=error",
            ]
        )  # fmt: skip
        try:
            watcher = Prometheus(folder, f"http://127.0.0.1:{port}")
            _until_looking(watcher)
            yield watcher
        finally:
            process.terminate()
            process.wait()


def _until_looking(watcher: Prometheus) -> None:
    for _ in range(300):
        with contextlib.suppress(httpx.HTTPError):
            if watcher.ask("up == 1"):
                return
        time.sleep(0.2)
    raise AssertionError("Prometheus does not reach the server")
