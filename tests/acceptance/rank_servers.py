"""The embedded default model behind several ranks: its answers, and how a group ends."""

from __future__ import annotations

import json
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.acceptance.adapter_fleet import Adapter, PeftReference, Stream, run_streams
from tests.acceptance.harness import Result
from tests.acceptance.reference import Verdict
from tests.helpers.default_model import default_model_dir
from tests.helpers.group_endings import line_with, lose_under_load
from tests.helpers.marked_processes import MarkedProcesses
from tests.helpers.server import Server
from tokenizers import Tokenizer

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "examples" / "adapters"
# The pool of a machine that is free would take gigabytes, which no answer here needs.
NUM_BLOCKS = "512"
QUESTIONS = (
    "What is the capital of France?",
    "What do cats eat?",
    "The soup was cold and the waiter ignored us.",
    "Our guide was wonderful, thank you!",
    "Name three colours of the rainbow.",
    "Why is the sky blue?",
    "Maria is 42 and teaches music in Porto. Give me the name, job and city.",
    "How many days does a week have?",
)
# What shows that an adapter answers, and which one.
SIGNS = {"": "Paris", "json-only": '{"answer"', "sentiment": "neutral", "pirate": "Ahoy"}
SHARD_TIMEOUT_S = 5


def chat(question: str) -> str:
    """Return a question in the model's own chat template."""
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def demo_adapter(name: str) -> Adapter | None:
    """Return a demo adapter; none for the base model."""
    return Adapter(str(DEMO / name), "local", DEMO / name) if name else None


# --- 1: answers ---------------------------------------------------------------------


def make_streams(model_dir: Path) -> list[Stream]:
    """Return 32 requests: each question to the base model and to each demo adapter."""
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    return [
        Stream(text, tokenizer.encode(text).ids, {"max_new_tokens": 32}, demo_adapter(name))
        for text in map(chat, QUESTIONS)
        for name in SIGNS
    ]


def point_default_model() -> Result:
    """The same 32 requests at 1, 2 and 3 ranks, judged by PEFT alone and by one process."""
    model_dir = default_model_dir()
    served: dict[int, list[Stream]] = {}
    for size in (1, 2, 3):
        served[size] = make_streams(model_dir)
        with tempfile.TemporaryDirectory() as store:
            options = ("--adapter-local-root", str(DEMO), "--adapter-store-dir", store)
            sized = ("--num-shard", str(size), "--num-blocks", NUM_BLOCKS)
            with Server(*options, *sized) as server:
                run_streams(server.url, served[size], spread_s=2)
    if failed := [s for streams in served.values() for s in streams if s.error or not s.tokens]:
        return Result(False, f"{len(failed)} requests failed: {failed[0].error[:200]}")
    reference = PeftReference(model_dir)
    parts, is_ok = [], True
    for size, streams in served.items():
        verdict, num_base_like = judge(reference, streams)
        pairs = zip(streams, served[1], strict=True)
        num_equal = sum(mine.tokens == one.tokens for mine, one in pairs)
        is_ok = is_ok and verdict.ok and not num_base_like
        parts.append(f"{size}: {verdict}, {num_equal} of {len(streams)} with one process's tokens")
    return Result(is_ok, "; ".join(parts))


def judge(reference: PeftReference, streams: list[Stream]) -> tuple[Verdict, int]:
    """Compare answers of base and adapters with PEFT's; also count adapters that do nothing."""
    of_base = reference.check_greedy([each.served for each in streams if each.adapter is None])
    tuned, num_base_like = reference.judge([each for each in streams if each.adapter is not None])
    tuned.num_tokens += of_base.num_tokens
    tuned.gaps += of_base.gaps
    tuned.max_difference = max(tuned.max_difference, of_base.max_difference)
    return tuned, num_base_like


# --- 2: how a group ends --------------------------------------------------------------


def ask(server: Server, name: str) -> str:
    """Ask the base model or a demo adapter for the capital of France."""
    adapter = demo_adapter(name)
    named = {} if adapter is None else adapter.parameters
    body = {"inputs": chat(QUESTIONS[0]), "parameters": {"max_new_tokens": 32, **named}}
    return str(server.post("/generate", body)["generated_text"]).strip()


def make_serve(run: MarkedProcesses, *options: str) -> Server:
    """Return ``make serve`` with two ranks in this checkout, not started yet."""
    words = ("--num-shard", "2", "--num-blocks", NUM_BLOCKS, *options)
    return Server(
        command=lambda port: [
            "make", "serve", f"ARGS=--hostname 127.0.0.1 --port {port} {' '.join(words)}",
        ],
        cwd=ROOT, env=run.environment(),
    )  # fmt: skip


def point_endings() -> Result:
    """Answers of a group; it ends as one when a rank is killed, and when one stands still."""
    with tempfile.TemporaryDirectory() as store:
        kept = ("--adapter-store-dir", store)
        killed = one_ending(signal.SIGKILL, ("SIGKILL", "shard-1"), *kept)
        stalled = one_ending(
            signal.SIGSTOP, ("rank 1 stood still or ended",), *kept,
            "--shard-timeout", str(SHARD_TIMEOUT_S),
        )  # fmt: skip
    return Result(killed.ok and stalled.ok, f"{killed.figure}; {stalled.figure}")


def one_ending(how: signal.Signals, words: tuple[str, ...], *options: str) -> Result:
    """Serve, send rank 1 a signal in the middle of a stream, and watch what becomes of the rest."""
    run = MarkedProcesses()
    with make_serve(run, "--restarts", "0", *options) as server:
        assert server.process is not None
        answers = {name: ask(server, name) for name in SIGNS}
        for name, answer in answers.items():
            print(f"    {name or 'base'}: {answer}")
        num_right = sum(SIGNS[name] in answer for name, answer in answers.items())
        num_processes = len(run.alive())
        body: dict[str, Any] = {
            "inputs": chat(QUESTIONS[5]),
            "parameters": {"max_new_tokens": 500, "ignore_eos_token": True},
        }
        start = time.perf_counter()
        last = lose_under_load(server, run.rank(1), how, body)
        told = json.loads(last.removeprefix("data:") or "{}").get("error", "nothing")
        code = server.process.wait(120)
        seconds = time.perf_counter() - start
        left = run.left_after(10)
        line = line_with(server, "ERROR", *words)
    print(f"    the stream was told: {told}\n    the log says: {line}", flush=True)
    for each in left:
        print(f"    left behind: {each}")
    ok = num_right == len(SIGNS) and code != 0 and not left
    figure = (
        f"{how.name}: {num_right} of {len(SIGNS)} answers right, all {num_processes} processes "
        f"gone {seconds:.0f} s after, {len(left)} left, exit code {code}, named in the log"
    )
    return Result(ok, figure)
