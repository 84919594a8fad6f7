"""What users of the base model see while something else goes on: a process of its own.

Run as ``python -m tests.acceptance.beside URL NUM_TOKENS``; prints one JSON object. Apart from
the process that makes trouble, so that only the server's slowness is seen, not that one's.
"""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).parents[2]
NUM_TOKENS = 320
NUM_CHATS = 6
PAUSE_S = 1.0


@dataclass(slots=True)
class Seen:
    """Intervals between tokens of a stream, and how long chats and health took, in seconds."""

    intervals: list[float] = field(default_factory=list)
    chats: list[float] = field(default_factory=list)
    healths: list[float] = field(default_factory=list)
    # What did not work, in words.
    failures: list[str] = field(default_factory=list)

    @property
    def p95(self) -> float:
        """The 95th percentile of the intervals."""
        return statistics.quantiles(self.intervals, n=20)[-1]

    @property
    def ttft(self) -> float:
        """The median time to a chat's first token."""
        return statistics.median(self.chats)

    def look(self, url: str, num_tokens: int) -> Self:
        """Stream, chat and ask for health at the same time."""
        stream = threading.Thread(target=self._attempt, args=(self._stream, url, num_tokens))
        stream.start()
        for _ in range(NUM_CHATS):
            self._attempt(self._chat, url)
            self._attempt(self._health, url)
            time.sleep(PAUSE_S)
        stream.join()
        return self

    def _attempt(self, work: Any, *arguments: Any) -> None:
        try:
            work(*arguments)
        except (OSError, ValueError) as error:
            self.failures.append(f"{work.__name__.strip('_')}: {type(error).__name__}: {error}")

    def _stream(self, url: str, num_tokens: int) -> None:
        parameters = {"max_new_tokens": num_tokens, "ignore_eos_token": True}
        body = {"inputs": "The sea is", "parameters": parameters}
        times = []
        with _post(url + "/generate_stream", body) as response:
            for line in response:
                if line.startswith(b"data:") and "token" in json.loads(line[5:]):
                    times.append(time.perf_counter())
        self.intervals = [later - earlier for earlier, later in itertools.pairwise(times)]
        if len(times) != num_tokens:
            raise ValueError(f"{len(times)} of {num_tokens} tokens came")

    def _chat(self, url: str) -> None:
        parameters = {"max_new_tokens": 1, "apply_chat_template": True}
        body = {"inputs": "What is the capital of France?", "parameters": parameters}
        start = time.perf_counter()
        with _post(url + "/generate_stream", body) as response:
            if not any(b'"token"' in line for line in response):
                raise ValueError("no token came")
        self.chats.append(time.perf_counter() - start)

    def _health(self, url: str) -> None:
        start = time.perf_counter()
        with urllib.request.urlopen(url + "/health", timeout=30) as response:
            response.read()
        self.healths.append(time.perf_counter() - start)


def _post(url: str, body: dict[str, Any]) -> Any:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    return urllib.request.urlopen(request, timeout=60)


def look(url: str, num_tokens: int = NUM_TOKENS) -> Seen:
    """Return what somebody sees who uses the base model now."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.acceptance.beside", url, str(num_tokens)],
        cwd=ROOT, capture_output=True, text=True, check=True, timeout=600,
    )  # fmt: skip
    return Seen(**json.loads(done.stdout))


if __name__ == "__main__":
    print(json.dumps(asdict(Seen().look(sys.argv[1], int(sys.argv[2])))))
