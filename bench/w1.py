"""Workload W1 over HTTP streams, beside transformers' static batches, in one run.

32 requests submitted at once, greedy, EOS ignored. With ``random.seed(0)``: 32 prompts
of ``randint(16, 128)`` ids from ``randint(100, 40000)``, then 32 output lengths from
``choice([16, 32, 64, 96])``. Over HTTP a prompt is text, so each prompt is the decoded
ids, encoded again and cut to the wanted length; both systems get the same ids.

The systems take turns; each keeps the machine to itself while it runs. Reported: output
tokens per second of each round, and the ratio of the medians.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

from tests.helpers.default_model import default_model_dir
from tests.helpers.server import Server
from tokenizers import Tokenizer

STATIC_BATCH = 8


class Workload:
    """Prompts and output lengths of W1."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        random.seed(0)
        prompts = [
            [random.randint(100, 40000) for _ in range(random.randint(16, 128))]
            for _ in range(32)
        ]  # fmt: skip
        self.lengths = [random.choice([16, 32, 64, 96]) for _ in range(32)]
        self.texts: list[str] = []
        self.ids: list[list[int]] = []
        self.truncate: list[int] = []
        for ids in prompts:
            text = tokenizer.decode(ids, skip_special_tokens=False)
            encoded = tokenizer.encode(text).ids[-len(ids) :]
            self.texts.append(text)
            self.ids.append(encoded)
            self.truncate.append(len(encoded))

    @property
    def num_output_tokens(self) -> int:
        """Tokens that a run must produce."""
        return sum(self.lengths)


def stream(url: str, body: dict[str, Any], times: list[float]) -> None:
    """Read one stream to its end; appends the arrival time of each token."""
    request = urllib.request.Request(
        url + "/generate_stream", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=600) as response:
        for line in response:
            if line.startswith(b"data:"):
                event = json.loads(line[5:])
                if "token" not in event:
                    raise RuntimeError(f"the server answered {event}")
                times.append(time.perf_counter())


def run_server(server: Server, load: Workload) -> tuple[float, list[float]]:
    """Send all requests at once; return tokens per second and the inter-token times."""
    arrivals: list[list[float]] = [[] for _ in load.texts]
    threads = []
    start = time.perf_counter()
    for text, length, cut, times in zip(
        load.texts, load.lengths, load.truncate, arrivals, strict=True
    ):
        parameters = {"max_new_tokens": length, "ignore_eos_token": True, "truncate": cut}
        body = {"inputs": text, "parameters": parameters}
        threads.append(threading.Thread(target=stream, args=(server.url, body, times)))
        threads[-1].start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - start
    counts = [len(times) for times in arrivals]
    if counts != load.lengths:
        raise RuntimeError(f"expected {load.lengths} tokens, got {counts}")
    gaps = [b - a for times in arrivals for a, b in itertools.pairwise(times)]
    return load.num_output_tokens / seconds, gaps


def run_transformers(model: Any, load: Workload) -> float:
    """Generate in static, left-padded batches of 8; return wanted tokens per second."""
    import torch

    start = time.perf_counter()
    for first in range(0, len(load.ids), STATIC_BATCH):
        batch = load.ids[first : first + STATIC_BATCH]
        length = max(load.lengths[first : first + STATIC_BATCH])
        width = max(map(len, batch))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in batch])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch])
        with torch.inference_mode():
            model.generate(
                input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=length,
                min_new_tokens=length, pad_token_id=0,
            )  # fmt: skip
    return load.num_output_tokens / (time.perf_counter() - start)


def load_transformers(model_dir: Path) -> Any:
    """Return the stock model in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()


def measure(rounds: int, options: list[str]) -> dict[str, Any]:
    """Run both systems in turns and return the figures."""
    model_dir = default_model_dir()
    load = Workload(Tokenizer.from_file(str(model_dir / "tokenizer.json")))
    model = load_transformers(model_dir)
    ours: list[float] = []
    theirs: list[float] = []
    gaps: list[float] = []
    with Server(*options) as server:
        run_server(server, load)  # warm both: first runs pay for lazy set-up
        for _ in range(rounds):
            theirs.append(run_transformers(model, load))
            rate, times = run_server(server, load)
            ours.append(rate)
            gaps = times
    gaps.sort()
    return {
        "ours_tokens_per_s": [round(rate, 1) for rate in ours],
        "transformers_static_8_tokens_per_s": [round(rate, 1) for rate in theirs],
        "ratio_of_medians": round(statistics.median(ours) / statistics.median(theirs), 2),
        "inter_token_ms_p50": round(gaps[len(gaps) // 2] * 1e3, 1),
        "inter_token_ms_p95": round(gaps[int(len(gaps) * 0.95)] * 1e3, 1),
    }


def main() -> None:
    """Print the figures as a table, and as JSON with --json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("options", nargs="*", help="options for lorax-launcher")
    arguments = parser.parse_args()
    figures = measure(arguments.rounds, arguments.options)
    width = max(map(len, figures))
    for name, value in figures.items():
        print(f"{name:<{width}}  {value}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
