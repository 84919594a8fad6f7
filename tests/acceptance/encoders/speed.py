"""Points of speed: texts a second beside other libraries, many adapters over one text, and chats beside vectors."""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.acceptance.encoders.vectors import NAME, embedding_model
from tests.acceptance.environments import environment
from tests.acceptance.harness import Result
from tests.helpers.classifier_folders import save_classifiers
from tests.helpers.server import Server

LIBRARIES = {"sentence-transformers": 1.5, "onnx": 1.0, "infinity-emb": 1.0}
REQUIREMENTS = {
    "sentence-transformers": ("torch==2.13.0", "sentence-transformers[onnx]"),
    "infinity-emb": ("torch==2.13.0", "infinity-emb[torch]", "transformers<5"),
}
NUM_TEXTS, ROUNDS = 256, 7
NUM_ADAPTERS, FANNED_ROUNDS = 20, 15
# Embedding requests a second beside chats, and seconds of each part.
RATE, PART_S = 50.0, 20.0
WORDS = "the quick brown fox jumps over a lazy dog while many adapters share one model".split()


def mixed_lengths(num: int, seed: int = 1) -> list[str]:
    """Return texts of mixed lengths (log-normal, 25 words in the middle, at most 180)."""
    draw = random.Random(seed)
    counts = [min(180, max(1, round(draw.lognormvariate(3.2, 0.8)))) for _ in range(num)]
    return [" ".join(draw.choice(WORDS) for _ in range(count)) for count in counts]


class Library:
    """Another library in a process of its own, asked for one round at a time."""

    def __init__(self, programs: Path, name: str, folder: Path) -> None:
        script = Path(__file__).with_name("rates.py")
        self._asked = {"library": name, "folder": str(folder)}
        self._process = subprocess.Popen(
            [str(programs / "python"), str(script)], stdin=subprocess.PIPE, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd="/",
        )  # fmt: skip

    def seconds(self, texts: list[str]) -> float:
        """Return how long all texts took; raises RuntimeError with what the library said."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({**self._asked, "texts": texts}) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("RATE "):
                answer = json.loads(line.removeprefix("RATE "))
                if "error" in answer:
                    raise RuntimeError(answer["error"])
                return float(answer["seconds"])
        raise RuntimeError("the library's process has ended")

    def close(self) -> None:
        """End its process."""
        self._process.kill()
        self._process.wait()


def seconds_of(work: Callable[[], object]) -> float:
    """Return how long a call takes."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def point_rates() -> Result:
    """Seconds for the same texts, by turns: a server over HTTP, and each library in its process."""
    texts = mixed_lengths(NUM_TEXTS)
    failed: list[str] = []
    body = {"model": NAME, "input": texts, "encoding_format": "base64"}
    with (
        embedding_model() as model,
        _libraries(model, failed) as libraries,
        Server("--model-id", str(model), "--served-model-name", NAME) as server,
    ):
        server.post("/v1/embeddings", body)
        ratios: dict[str, list[float]] = {name: [] for name in libraries}
        for _ in range(ROUNDS):
            own = seconds_of(lambda: server.post("/v1/embeddings", body))
            for name, library in libraries.items():
                ratios[name].append(library.seconds(texts) / own)
    lines = [
        f"{name} {statistics.median(each):.2f}x ({min(each):.2f} to {max(each):.2f}; of "
        f"{LIBRARIES[name]:g}x)"
        for name, each in ratios.items()
    ]
    ok = not failed and all(
        statistics.median(each) >= LIBRARIES[name] for name, each in ratios.items()
    )
    return Result(ok, f"{NUM_TEXTS} texts, {ROUNDS} rounds: {'; '.join(lines + failed)}")


@contextmanager
def _libraries(model: Path, failed: list[str]) -> Iterator[dict[str, Library]]:
    """The libraries that can be had, warm; what cannot is put into ``failed``."""
    running: dict[str, Library] = {}
    with (
        environment(*REQUIREMENTS["sentence-transformers"]) as first,
        environment(*REQUIREMENTS["infinity-emb"]) as second,
    ):
        for name, programs in (
            ("sentence-transformers", first), ("onnx", first), ("infinity-emb", second),
        ):  # fmt: skip
            library = Library(programs, name, model)
            try:
                library.seconds(mixed_lengths(8))
                running[name] = library
            except RuntimeError as error:
                failed.append(f"{name} does not run here: {error}")
                library.close()
        try:
            yield running
        finally:
            for library in running.values():
                library.close()


def point_fanned_out() -> Result:
    """One text through 20 adapters in a request, against one adapter; by turns."""
    text = mixed_lengths(1, seed=5)[0] + " " + " ".join(WORDS * 2)
    with embedding_model() as model, tempfile.TemporaryDirectory() as name:
        names = save_classifiers(model, Path(name), NUM_ADAPTERS)
        options = ("--adapter-local-root", name, "--default-adapter-source", "local")
        with Server("--model-id", str(model), *options) as server:

            def ask(adapters: list[str]) -> Any:
                return server.post("/classify", {"inputs": text, "adapters": adapters})

            answers = ask(names)
            if len(answers) != NUM_ADAPTERS or any("error" in each for each in answers):
                return Result(False, f"not all adapters answered: {str(answers)[:300]}")
            ratios = []
            for _ in range(FANNED_ROUNDS):
                one = seconds_of(lambda: ask(names[:1]))
                ratios.append(seconds_of(lambda: ask(names)) / one)
    middle = statistics.median(ratios)
    return Result(
        middle <= 2.0,
        f"{NUM_ADAPTERS} adapters take {middle:.2f}x of one ({min(ratios):.2f} to "
        f"{max(ratios):.2f}; at most 2x)",
    )


def point_beside_chats() -> Result:
    """Streams of the default model, alone and beside vectors of it; time between tokens at p99."""
    texts = mixed_lengths(int(RATE * PART_S), seed=9)
    with Server("--served-model-name", NAME) as server:
        _streamed(server, 5.0)
        alone = _streamed(server, PART_S)
        with _asked_for_vectors(server, texts) as done:
            beside = _streamed(server, PART_S)
        again = _streamed(server, PART_S)
    quiet_p99 = statistics.median([_p99(alone), _p99(again)])
    ratio = _p99(beside) / quiet_p99
    return Result(
        ratio <= 1.5,
        f"p99 between tokens {1e3 * quiet_p99:.0f} ms alone, {1e3 * _p99(beside):.0f} ms beside "
        f"{sum(done)} vectors in {PART_S:g} s: {ratio:.2f}x (at most 1.5x)",
    )


def _p99(gaps: list[float]) -> float:
    return sorted(gaps)[int(0.99 * (len(gaps) - 1))]


def _streamed(server: Server, seconds: float, num: int = 4) -> list[float]:
    """Return the seconds between tokens of some streams that run for so long."""
    until = time.perf_counter() + seconds
    gaps: list[float] = []

    def run(number: int) -> None:
        while time.perf_counter() < until:
            body = {
                "inputs": f"Tell me of {WORDS[number]} {time.time_ns()}", "stream": True,
                "parameters": {"max_new_tokens": 64, "ignore_eos_token": True},
            }  # fmt: skip
            latest = None
            for _ in _events(server, body):
                now = time.perf_counter()
                if latest is not None:
                    gaps.append(now - latest)
                latest = now

    with ThreadPoolExecutor(num) as pool:
        list(pool.map(run, range(num)))
    return gaps


def _events(server: Server, body: dict[str, Any]) -> Iterator[bytes]:
    """Yield the events of one stream as they come."""
    request = urllib.request.Request(
        f"{server.url}/generate_stream",
        json.dumps(body).encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=300) as response:
        yield from (line for line in response if line.startswith(b"data:"))


@contextmanager
def _asked_for_vectors(server: Server, texts: list[str]) -> Iterator[list[int]]:
    """Within, vectors are asked for at a steady rate, whatever the answers take."""
    over = threading.Event()
    done: list[int] = []

    def ask(text: str) -> None:
        if not over.is_set():
            server.post("/v1/embeddings", {"model": NAME, "input": text})
            done.append(1)

    def feed(pool: ThreadPoolExecutor) -> None:
        begun = time.perf_counter()
        for number, text in enumerate(texts):
            if over.wait(max(0.0, begun + number / RATE - time.perf_counter())):
                return
            pool.submit(ask, text)

    with ThreadPoolExecutor(64) as pool:
        feeder = threading.Thread(target=feed, args=(pool,))
        feeder.start()
        try:
            yield done
        finally:
            over.set()
            feeder.join()
