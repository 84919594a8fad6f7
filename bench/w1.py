"""Workload W1 over HTTP streams, beside other systems, in one run.

32 requests submitted at once, greedy, EOS ignored. With ``random.seed(0)``: 32 prompts
of ``randint(16, 128)`` ids from ``randint(100, 40000)``, then 32 output lengths from
``choice([16, 32, 64, 96])``. Over HTTP a prompt is text, so each prompt is the decoded
ids, encoded again and cut to the wanted length; all systems get the same ids.

With ``--adapters N`` request i uses adapter i modulo N: rank 8 for even, 16 for odd
adapters, alpha 16, all seven linears of every block. Beside it then run this server
without adapters, PEFT's mixed batches and, with ``--peers vllm``, vLLM for CPU with the
same adapters, in an environment of its own that is made when it is first asked for.

``--peers ranks`` runs this server with two ranks too.

The systems take turns; PEFT, which takes minutes, has one. Each keeps the machine to
itself while it runs. Reported: output tokens per second of each round, and ratios of the
medians.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from bench.peers import VllmPeer, load_peft, load_transformers, static_batches
from tests.helpers.default_model import default_model_dir
from tests.helpers.formula_adapters import write_formula_adapter
from tests.helpers.server import Server
from tokenizers import Tokenizer

RANKS = (8, 16)
PEERS = ("static", "vllm", "ranks")


class W1Load:
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


def write_adapters(model_dir: Path, folder: Path, num: int) -> list[Path]:
    """Write W1's adapters and return their folders."""
    return [
        write_formula_adapter(
            model_dir, folder / f"adapter-{number}", rank=RANKS[number % 2], seed=number
        )
        for number in range(num)
    ]


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


def run_server(
    server: Server, load: W1Load, adapters: Sequence[Path] = ()
) -> tuple[float, list[float]]:
    """Send all requests at once; return tokens per second and the inter-token times."""
    arrivals: list[list[float]] = [[] for _ in load.texts]
    threads = []
    start = time.perf_counter()
    for index, times in enumerate(arrivals):
        parameters = {
            "max_new_tokens": load.lengths[index], "ignore_eos_token": True,
            "truncate": load.truncate[index],
        }  # fmt: skip
        if adapters:
            parameters["adapter_id"] = str(adapters[index % len(adapters)])
            parameters["adapter_source"] = "local"
        body = {"inputs": load.texts[index], "parameters": parameters}
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


def measure(rounds: int, peers: Sequence[str], options: Sequence[str]) -> dict[str, Any]:
    """Run this server and its peers in turns and return the figures."""
    model_dir = default_model_dir()
    load = W1Load(Tokenizer.from_file(str(model_dir / "tokenizer.json")))
    gaps: list[float] = []
    systems: dict[str, Callable[[], float]] = {}
    if "static" in peers:
        model = load_transformers(model_dir)
        systems["transformers_static_8"] = lambda: static_batches(model, load.ids, load.lengths)

    def ours() -> float:
        rate, gaps[:] = run_server(server, load)
        return rate

    with contextlib.ExitStack() as stack:
        if "ranks" in peers:
            spread = stack.enter_context(Server("--num-shard", "2", *options))
            run_server(spread, load)
            systems["ours_2_ranks"] = lambda: run_server(spread, load)[0]
        server = stack.enter_context(Server(*options))
        run_server(server, load)  # warm: first runs pay for lazy set-up
        systems["ours"] = ours
        rates = take_turns(systems, rounds)
    found = figures(rates, gaps)
    if "static" in peers:
        found["ratio_of_medians"] = ratio(rates, "ours", "transformers_static_8")
    if "ranks" in peers:
        found["ratio_of_2_ranks_to_1"] = ratio(rates, "ours_2_ranks", "ours")
    return found


def measure_adapters(
    num: int, rounds: int, peers: Sequence[str], environment: Path | None, options: Sequence[str]
) -> dict[str, Any]:
    """Run this server with and without adapters and the peers in turns; return the figures."""
    model_dir = default_model_dir()
    load = W1Load(Tokenizer.from_file(str(model_dir / "tokenizer.json")))
    gaps: list[float] = []
    systems: dict[str, Callable[[], float]] = {}
    with contextlib.ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        adapters = write_adapters(model_dir, root, num)
        if "static" in peers:
            model = load_peft(model_dir, adapters)
            names = [adapters[i % num].name for i in range(len(load.ids))]
            systems["peft_static_8"] = lambda: static_batches(model, load.ids, load.lengths, names)
        if "vllm" in peers:
            peer = VllmPeer(
                model_dir, adapters, max(RANKS), load.ids, load.lengths, environment=environment
            )
            systems["vllm"] = stack.enter_context(peer).run
        server = stack.enter_context(Server("--adapter-local-root", str(root), *options))

        def ours() -> float:
            rate, gaps[:] = run_server(server, load, adapters)
            return rate

        systems["ours_without_adapters"] = lambda: run_server(server, load)[0]
        systems["ours"] = ours
        # First runs pay for lazy set-up, and for the adapters' way to the shard.
        systems["ours_without_adapters"]()
        ours()
        rates = take_turns(systems, rounds, once={"peft_static_8"})
    found = figures(rates, gaps)
    for peer_name in rates.keys() - {"ours"}:
        found[f"ratio_to_{peer_name}"] = ratio(rates, "ours", peer_name)
    return found | {"added_to_a_step": added_to_a_step(num)}


def take_turns(
    systems: dict[str, Callable[[], float]], rounds: int, once: Collection[str] = ()
) -> dict[str, list[float]]:
    """Run each system once a round; return their rates. ``once``: in the first round only."""
    rates: dict[str, list[float]] = {name: [] for name in systems}
    for number in range(rounds):
        for name, run in systems.items():
            if number and name in once:
                continue
            rates[name].append(run())
            print(f"{name}: {rates[name][-1]:.1f} tokens/s", file=sys.stderr)
    return rates


def ratio(rates: dict[str, list[float]], one: str, other: str) -> float:
    """Return the ratio of two systems' medians."""
    return round(statistics.median(rates[one]) / statistics.median(rates[other]), 2)


def figures(rates: dict[str, list[float]], gaps: list[float]) -> dict[str, Any]:
    """Return what is printed: the rates, and the inter-token times of our last round."""
    gaps = sorted(gaps)
    return {
        **{f"{name}_tokens_per_s": [round(r, 1) for r in each] for name, each in rates.items()},
        "inter_token_ms_p50": round(gaps[len(gaps) // 2] * 1e3, 1),
        "inter_token_ms_p95": round(gaps[int(len(gaps) * 0.95)] * 1e3, 1),
    }


def added_to_a_step(num: int) -> list[dict[str, float]]:
    """Return what adapters add to a decode step of 32 rows, beside their floor, by rank.

    In processor time of one thread, which other programs hardly change.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cases.json"
        sizes = ["--rows", "32", "--adapters", str(num), "--rounds", "10", "--one-thread"]
        command = [sys.executable, "-m", "bench.lora", *sizes, "--json", str(path)]
        subprocess.run(command, check=True, stdout=sys.stderr)
        cases: list[dict[str, float]] = json.loads(path.read_text())
    return [{name: round(value, 1) for name, value in case.items()} for case in cases]


def main() -> None:
    """Print the figures as a table, and as JSON with --json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--adapters", type=int, default=0, help="distinct adapters, such as 8, 32")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=["static"])
    parser.add_argument("--vllm-environment", type=Path, help="a folder to make or find it in")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("options", nargs="*", help="options for lorax-launcher, after --")
    arguments = parser.parse_args()
    # What was started is ended however this program ends.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if arguments.adapters:
        found = measure_adapters(
            arguments.adapters, arguments.rounds, arguments.peers,
            arguments.vllm_environment, arguments.options,
        )  # fmt: skip
    else:
        found = measure(arguments.rounds, arguments.peers, arguments.options)
    width = max(map(len, found))
    for name, value in found.items():
        print(f"{name:<{width}}  {value}")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
