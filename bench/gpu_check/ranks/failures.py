"""A rank that is killed, and one that stands still, under streams of a whole server.

What is looked at: how soon it is noticed, that the group starts again, that every stream goes on
to its last token, and what became of the tokens. Those of streams that nobody disturbs are the
reference. Behind a pause a stream's context is computed anew in one pass, which rounds in another
way on a GPU: a near tie may then fall the other way, so equal streams are counted there. On CPUs
kernels are chosen whose numbers do not depend on that, and all streams have to be equal.
"""

from __future__ import annotations

import json
import signal
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from bench.gpu_check.loads import RequestLoad, ServingSizes, read_tokenizer, write_model
from bench.gpu_check.models import LLAMA_1B, TINY, device_of
from bench.gpu_check.ranks.group import environment
from bench.gpu_check.report import FAILED, SKIPPED, Report
from bench.gpu_check.requests import launcher_command, launcher_environment, missing_http
from tests.helpers.formula_adapters import write_formula_adapter
from tests.helpers.marked_processes import MarkedProcesses
from tests.helpers.server import Server

_COLUMNS = (
    "rank 1 is", "noticed after, s", "allowed", "group back after, s", "longest pause, s", "streams",
    "whole", "as undisturbed",
)  # fmt: skip
# Streams of this many tokens are under way when it happens.
_UNDER_WAY = 8
# Seconds beyond the time that the ranks wait for each other: they ask who stands still, and end.
_BLAME_S = 15.0
_BACK_S = 150.0


class FailureSizes(NamedTuple):
    """What is served, and how long ranks wait for each other."""

    serving: ServingSizes
    shard_timeout_s: float
    options: tuple[str, ...]


FULL = FailureSizes(
    ServingSizes(LLAMA_1B, "bfloat16", 2, RequestLoad(16, 64, 384), RequestLoad(1, 1, 1)), 10.0,
    ("--device", "cuda"),
)  # fmt: skip
SMALL = FailureSizes(
    ServingSizes(TINY, "float32", 2, RequestLoad(6, 12, 200), RequestLoad(1, 1, 1)), 10.0,
    ("--device", "cpu", "--num-blocks", "512", "--linear-backend", "panel",
     "--attention-backend", "cpp"),
)  # fmt: skip


class HeardStream(NamedTuple):
    """What one client heard: tokens, when each came, and why it ended early ("": it did not)."""

    ids: list[int]
    times_s: list[float]
    error: str

    @property
    def longest_pause_s(self) -> float:
        """The longest time between two tokens."""
        pairs = zip(self.times_s, self.times_s[1:], strict=False)
        return max((later - earlier for earlier, later in pairs), default=0.0)


class LossFigures(NamedTuple):
    """What came of a rank that was lost: seconds from the signal on, and the streams."""

    noticed_s: float
    back_s: float
    streams: list[HeardStream]


def run(report: Report, *, small: bool, ranks: int) -> None:
    """Kill rank 1, then let it stand still."""
    if missing := missing_http():
        report.end(SKIPPED, f"the server needs {', '.join(missing)}")
        return
    sizes = SMALL if small else FULL
    report.table("A rank is lost under streams", _COLUMNS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model_dir = write_model(folder / "model", sizes.serving, device_of(small))
        adapters = tuple(
            str(write_formula_adapter(model_dir, folder / f"adapter-{n}", rank=8, seed=n))
            for n in range(sizes.serving.num_adapters)
        )
        load = sizes.serving.load._replace(adapters=adapters)
        marks = MarkedProcesses()
        with _server(folder, model_dir, sizes, marks, ranks, small=small) as server:
            undisturbed = Crowd(server, load, model_dir).finished()
            if errors := [each.error for each in undisturbed if each.error]:
                raise RuntimeError(f"undisturbed, {len(errors)} streams fail: {errors[0]}")
            wrong: list[str] = []
            for words, how in (("killed", signal.SIGKILL), ("stopped", signal.SIGSTOP)):
                crowd = Crowd(server, load, model_dir)
                figures = lose(server, marks, crowd, how)
                wrong += judge(report, words, figures, undisturbed, sizes, small=small)
    if wrong:
        report.end(FAILED, "; ".join(wrong))


def _server(
    folder: Path,
    model_dir: Path,
    sizes: FailureSizes,
    marks: MarkedProcesses,
    ranks: int,
    *,
    small: bool,
) -> Server:
    options = [
        "--model-id", str(model_dir), "--dtype", sizes.serving.dtype, "--num-shard", str(ranks),
        "--shard-timeout", str(sizes.shard_timeout_s), "--max-total-tokens", "512",
        "--adapter-local-root", str(folder), "--default-adapter-source", "local",
        "--cache-dir", str(folder / "cache"), "--json-output", *sizes.options,
    ]  # fmt: skip
    variables = launcher_environment(folder)
    if small:
        variables |= environment(0, small=True) | {"PATH": variables["PATH"]}
    variables |= marks.environment(PATH=variables["PATH"], PWD=variables["PWD"]) | variables
    variables.pop("TRITON_INTERPRET", None)
    return Server(
        command=lambda port: launcher_command(port, options), env=variables, ready_timeout_s=200.0
    )


class Crowd:
    """Streams that are read at the same time, a thread each."""

    def __init__(self, server: Server, load: RequestLoad, model_dir: Path) -> None:
        self._url, self._load = f"{server.url}/generate_stream", load
        self.streams = [HeardStream([], [], "") for _ in range(load.num_requests)]
        texts = load.texts(read_tokenizer(model_dir))
        self._threads = [
            threading.Thread(target=self._listen, args=each) for each in enumerate(texts)
        ]
        for thread in self._threads:
            thread.start()

    def _listen(self, number: int, text: str) -> None:
        body = {"inputs": text, "parameters": self._load.parameters(number)}
        request = urllib.request.Request(
            self._url, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        heard = self.streams[number]
        try:
            with urllib.request.urlopen(request, timeout=600) as response:
                for line in response:
                    if line.startswith(b"data:"):
                        self._take(number, json.loads(line[5:]))
        except OSError as error:
            self.streams[number] = heard._replace(error=f"{type(error).__name__}: {error}")

    def _take(self, number: int, event: dict[str, Any]) -> None:
        heard = self.streams[number]
        if "token" in event:
            heard.ids.append(event["token"]["id"])
            heard.times_s.append(time.monotonic())
        elif "error" in event:
            self.streams[number] = heard._replace(error=str(event["error"]))

    def wait_until_under_way(self) -> None:
        """Return once every stream has some tokens; RuntimeError if that does not come."""
        _until(lambda: all(len(each.ids) >= _UNDER_WAY for each in self.streams), 120.0,
               "the streams do not begin")  # fmt: skip

    def finished(self) -> list[HeardStream]:
        """Return the streams once all have ended."""
        for thread in self._threads:
            thread.join()
        return self.streams


def lose(server: Server, marks: MarkedProcesses, crowd: Crowd, how: signal.Signals) -> LossFigures:
    """Send rank 1 a signal in the middle of the streams, and wait for their ends."""
    crowd.wait_until_under_way()
    sent = time.monotonic()
    seconds = {}
    known = {name: _count(server, name) for name in ("shards_lost", "shards_back")}
    marks.rank(1).send_signal(how)
    for name, num in known.items():
        _until(partial(_more, server, name, num), _BACK_S, f"the log does not say {name}")
        seconds[name] = time.monotonic() - sent
    return LossFigures(seconds["shards_lost"], seconds["shards_back"], crowd.finished())


def _more(server: Server, name: str, num: int) -> bool:
    return _count(server, name) > num


def _count(server: Server, name: str) -> int:
    """Return how many events of this name the log has; read as it comes, so that no clock matters."""
    lines = [line for line in list(server.lines) if line.startswith("{") and f'"{name}"' in line]
    return sum(json.loads(line).get("event") == name for line in lines)


def _until(is_so: Callable[[], bool], timeout_s: float, otherwise: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{otherwise} within {timeout_s:g} s")
        time.sleep(0.02)


def judge(
    report: Report,
    words: str,
    figures: LossFigures,
    undisturbed: list[HeardStream],
    sizes: FailureSizes,
    *,
    small: bool,
) -> list[str]:
    """Add a line, and return what is wrong with it."""
    allowed = sizes.shard_timeout_s + _BLAME_S
    asked = sizes.serving.load.output_tokens
    streams = figures.streams
    whole = sum(not each.error and len(each.ids) == asked for each in streams)
    same = sum(a.ids == b.ids for a, b in zip(streams, undisturbed, strict=True))
    report.row(
        words, figures.noticed_s, allowed, figures.back_s,
        max(each.longest_pause_s for each in streams), len(streams), whole, same,
    )  # fmt: skip
    wrong = []
    if figures.noticed_s > allowed:
        wrong.append(f"{words}: noticed after {figures.noticed_s:.0f} s of {allowed:.0f}")
    if whole < len(streams):
        reason = next((each.error for each in streams if each.error), "too few tokens")
        wrong.append(f"{words}: {len(streams) - whole} streams did not end whole: {reason}")
    if small and same < len(streams):
        wrong.append(f"{words}: {len(streams) - same} streams have other tokens")
    return wrong
