"""One long prompt to many adapters: what sharing its blocks saves, as ratios within one run.

Requests for k adapters come at once, all with one prompt of about 2,000 tokens that was not seen
before, and ask for a few tokens each. ``invoked`` adapters act from a mark behind the prompt on
(PEFT's ``alora_invocation_tokens``), so that its blocks are the base model's, computed once;
``ordinary`` ones have the same weights and act on the whole prompt. Each way takes turns on one
server with the adapters loaded; the ordinary ones, which take minutes, have one turn.
Reported: seconds until the last answer, and ratios of the medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.acceptance.serve import Prompts
from tests.helpers.default_model import default_model_dir
from tests.helpers.formula_adapters import write_formula_adapter
from tests.helpers.server import Server

MARK = "<|im_start|>judge"
NUM_ADAPTERS, NUM_PROMPT, NUM_NEW, RANK = 20, 2000, 8, 8
FANS = (1, 5, 20)
KINDS = ("invoked", "ordinary")


@dataclass(frozen=True, slots=True)
class Asked:
    """What one adapter's request came to."""

    cached: int
    prompt: int


class FanOut:
    """A server with adapters of both kinds, and prompts that nobody has seen."""

    def __init__(self, model_dir: Path, root: Path, server: Server) -> None:
        self._server = server
        self._prompts = Prompts(model_dir, seed=5)
        self.folders = write_adapters(model_dir, root, self._prompts)

    def load(self) -> None:
        """Have all adapters on the shards."""
        for kind in KINDS:
            self.run(kind, NUM_ADAPTERS, num_prompt=16)

    def run(self, kind: str, num: int, num_prompt: int = NUM_PROMPT) -> tuple[float, list[Asked]]:
        """Send one prompt to some adapters at once; return the seconds, and what was cached."""
        text, _ = self._prompts.make(num_prompt)
        answers: list[Asked] = []
        threads = [
            threading.Thread(target=self._ask, args=(folder, text + MARK, answers))
            for folder in self.folders[kind][:num]
        ]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.perf_counter() - start
        if len(answers) != num:
            raise RuntimeError(f"{num - len(answers)} of {num} requests failed")
        return seconds, answers

    def _ask(self, folder: Path, text: str, answers: list[Asked]) -> None:
        body = {
            "model": f"local:{folder}", "prompt": text, "max_tokens": NUM_NEW, "temperature": 0,
            "ignore_eos": True,
        }  # fmt: skip
        usage = self._server.post("/v1/completions", body, timeout_s=3600)["usage"]
        if usage["completion_tokens"] != NUM_NEW:
            raise RuntimeError(f"{usage['completion_tokens']} tokens came, not {NUM_NEW}")
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        answers.append(Asked(cached, usage["prompt_tokens"]))


def write_adapters(model_dir: Path, root: Path, prompts: Prompts) -> dict[str, list[Path]]:
    """Write the adapters of each kind; those of one number have the same weights."""
    mark = prompts.tokenizer.encode(MARK).ids
    return {
        kind: [
            write_formula_adapter(
                model_dir, root / f"{kind}-{number}", rank=RANK, seed=number,
                invocation=mark if kind == "invoked" else (),
            )
            for number in range(NUM_ADAPTERS)
        ]
        for kind in KINDS
    }  # fmt: skip


def measure(rounds: int, options: list[str]) -> dict[str, Any]:
    """Return seconds by kind and number of adapters, and their ratios."""
    model_dir = default_model_dir()
    seconds: dict[tuple[str, int], list[float]] = defaultdict(list)
    shared = 0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        arguments = [
            "--adapter-local-root", str(root), "--adapter-store-dir", str(root / "store"),
            "--max-active-adapters", str(len(KINDS) * NUM_ADAPTERS), *options,
        ]  # fmt: skip
        with Server(*arguments) as server:
            fan_out = FanOut(model_dir, root, server)
            fan_out.load()
            for number in range(rounds):
                ways = [("invoked", num) for num in FANS]
                for kind, num in [*ways, ("ordinary", NUM_ADAPTERS)] if not number else ways:
                    took, answers = fan_out.run(kind, num)
                    seconds[kind, num].append(took)
                    cached = sorted(each.cached for each in answers)
                    if kind == "invoked" and num == NUM_ADAPTERS:
                        shared = cached[1]
                    print(
                        f"{kind} {num}: {took:.1f} s, cached {cached[0]} to {cached[-1]}",
                        flush=True,
                    )
    return figures(seconds, shared)


def figures(seconds: dict[tuple[str, int], list[float]], shared: int) -> dict[str, Any]:
    """Return medians and ratios."""
    medians = {way: statistics.median(times) for way, times in seconds.items()}
    one = medians["invoked", 1]
    return {
        "seconds": {f"{kind} {num}": round(value, 2) for (kind, num), value in medians.items()},
        # Tokens of the prompt that all adapters but the first found.
        "shared_tokens": shared,
        "five_to_one": round(medians["invoked", 5] / one, 3),
        "twenty_to_one": round(medians["invoked", 20] / one, 3),
        "ordinary_to_invoked": round(medians["ordinary", 20] / medians["invoked", 20], 2),
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    options, rest = parser.parse_known_args()
    found = measure(options.rounds, rest)
    print(json.dumps(found, indent=2))
    if options.json is not None:
        options.json.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
