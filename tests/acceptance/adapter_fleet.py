"""Many adapters of the real default model behind one server: how they are made, asked, judged."""

from __future__ import annotations

import itertools
import json
import os
import random
import threading
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.acceptance.reference import Reference, Served, Verdict
from tests.helpers.formula_adapters import write_formula_adapter
from tests.helpers.hub_stub import StubHub
from tests.helpers.server import Server

RANKS = (1, 2, 4, 8, 16, 32, 64)
# Rounding of float32 stays far below this; a wrong adapter is far above.
MAX_DIFFERENCE = 1e-2


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter as a request names it, and where PEFT finds it."""

    id: str
    source: str
    folder: Path

    @property
    def parameters(self) -> dict[str, Any]:
        """What a request says to use it."""
        return {"adapter_id": self.id, "adapter_source": self.source}


def make_adapter(
    model_dir: Path, root: Path, name: str, *, rank: int, seed: int, hub: StubHub | None = None
) -> Adapter:
    """Make an adapter below ``root``; with a hub it is served from there."""
    folder = write_formula_adapter(model_dir, root / name, rank=rank, seed=seed)
    if hub is None:
        return Adapter(str(folder), "local", folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    hub.repositories[f"fleet/{name}"] = files
    return Adapter(f"fleet/{name}", "hub", folder)


def serve(hub: StubHub, root: Path, store: Path, *options: str) -> Server:
    """Return a server that takes adapters from a stub hub and from below ``root``."""
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    return Server(
        "--adapter-local-root", str(root), "--adapter-store-dir", str(store), *options,
        env=environment | {"HF_ENDPOINT": hub.url},
    )  # fmt: skip


@dataclass(slots=True)
class Stream:
    """One request and what came back, with the times at which it came."""

    text: str
    ids: list[int]
    parameters: dict[str, Any]
    adapter: Adapter | None = None
    # False: the answer comes as a whole, so that a refusal has a status of its own.
    is_streamed: bool = True
    started_at: float = 0.0
    times: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    # HTTP status and words of a refusal.
    status: int = 0
    error: str = ""

    @property
    def gaps(self) -> list[float]:
        """Seconds between tokens."""
        return [later - earlier for earlier, later in itertools.pairwise(self.times)]

    @property
    def served(self) -> Served:
        """The answer, to be judged."""
        return Served(self.ids, self.tokens, self.logprobs)

    def run(self, url: str, delay_s: float = 0.0) -> None:
        """Send the request after a while and read its stream to the end."""
        time.sleep(delay_s)
        named = {} if self.adapter is None else self.adapter.parameters
        body = {"inputs": self.text, "parameters": self.parameters | named}
        request = urllib.request.Request(
            url + ("/generate_stream" if self.is_streamed else "/generate"), json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )  # fmt: skip
        self.started_at = time.perf_counter()
        try:
            with urllib.request.urlopen(request, timeout=600) as response:
                self.status = response.status
                for line in response:
                    if line.startswith(b"data:"):
                        self._take(json.loads(line[5:]))
        except urllib.error.HTTPError as error:
            self.status, self.error = error.code, error.read().decode()
        except OSError as error:
            self.error = f"{type(error).__name__}: {error}"

    def _take(self, event: dict[str, Any]) -> None:
        if "token" not in event:
            self.error = json.dumps(event)
            return
        self.times.append(time.perf_counter())
        self.tokens.append(event["token"]["id"])
        self.logprobs.append(event["token"]["logprob"])


def run_streams(url: str, streams: Sequence[Stream], spread_s: float = 0.0) -> None:
    """Run all streams, each from a thread of its own, their starts spread over some seconds."""
    threads = [
        threading.Thread(target=stream.run, args=(url, spread_s * index / len(streams)))
        for index, stream in enumerate(streams)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def zipf_choice(rng: random.Random, adapters: Sequence[Adapter], count: int) -> list[Adapter]:
    """Choose ``count`` of the adapters, each at least once, the k-th with weight 1 / k."""
    weights = [1 / (place + 1) for place in range(len(adapters))]
    chosen = [*adapters, *rng.choices(adapters, weights, k=count - len(adapters))]
    rng.shuffle(chosen)
    return chosen


def longest_silence(streams: Sequence[Stream]) -> float:
    """Return the longest time in which no stream got a token while some waited for one."""
    moments = sorted(moment for stream in streams for moment in stream.times)
    moments = [min(stream.started_at for stream in streams), *moments]
    waits = sorted((s.started_at, s.times[-1]) for s in streams if s.times)
    return max(
        (
            later - earlier
            for earlier, later in itertools.pairwise(moments)
            if any(start <= earlier and end >= later for start, end in waits)
        ),
        default=0.0,
    )


class PeftReference(Reference):
    """The stock model under PEFT, one adapter and one request at a time."""

    def __init__(self, model_dir: Path, attention: str = "sdpa") -> None:
        super().__init__(model_dir, attention)
        self._base = self._model

    def judge(self, streams: Sequence[Stream]) -> tuple[Verdict, int]:
        """Compare answers with PEFT's; also count adapters whose first answer is the base's."""
        from peft import PeftModel

        by_folder: dict[Path, list[Served]] = defaultdict(list)
        for stream in streams:
            assert stream.adapter is not None
            by_folder[stream.adapter.folder].append(stream.served)
        whole, num_base_like = Verdict(), 0
        for folder, answers in by_folder.items():
            wrapped = PeftModel.from_pretrained(self._base, folder).eval()
            self._model = wrapped
            verdict = self.check_greedy(answers)
            whole.num_tokens += verdict.num_tokens
            whole.gaps += verdict.gaps
            whole.max_difference = max(whole.max_difference, verdict.max_difference)
            with wrapped.disable_adapter():
                num_base_like += not self.check_greedy(answers[:1]).gaps
            self._base = wrapped.unload()
        self._model = self._base
        return whole, num_base_like
