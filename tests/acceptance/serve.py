"""Serve a real model end to end: the points of its "Done means" list."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
import venv
from pathlib import Path
from typing import Any

from tests.acceptance.harness import Point, Result
from tests.acceptance.reference import Reference, Served
from tests.acceptance.speed.comparisons import at_least
from tests.acceptance.suites import figures_of
from tests.helpers.default_model import default_model_dir
from tests.helpers.server import Server
from tokenizers import Tokenizer

ROOT = Path(__file__).parents[2]
QUESTION = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
SECOND_START_S = 20.0
STATIC = (0, ("static",), ("w1",))


# --- 1: a fresh clone -----------------------------------------------------------


def clean_environment(home: Path) -> dict[str, str]:
    """Return an environment without caches and virtual environments, pip's settings kept."""
    kept = ("PIP_", "SSL_", "REQUESTS_", "HTTP_", "HTTPS_", "NO_PROXY", "http", "no_proxy")
    environment = {key: value for key, value in os.environ.items() if key.startswith(kept)}
    path = os.pathsep.join(
        part for part in os.environ["PATH"].split(os.pathsep) if ".venv" not in part
    )
    return environment | {"PATH": path, "HOME": str(home), "LANG": "C.UTF-8"}


def fresh_clone(folder: Path) -> Path:
    """Clone the committed state of this checkout."""
    clone = folder / "clone"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    (folder / "home").mkdir()
    return clone


def serve_in_clone(clone: Path, environment: dict[str, str]) -> Server:
    """Return ``make serve`` in the clone, not started yet."""
    return Server(
        command=lambda port: [
            "make", "serve", f"ARGS=--hostname 127.0.0.1 --port {port}"
        ],
        cwd=clone, env=environment, ready_timeout_s=900,
    )  # fmt: skip


def point_fresh_clone() -> Result:
    """make serve, an answer, a second start."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        clone = fresh_clone(folder)
        environment = clean_environment(folder / "home")
        with serve_in_clone(clone, environment) as server:
            first_s = server.ready_s
            text = ask_for_paris(server)
        with serve_in_clone(clone, environment) as server:
            second_s = server.ready_s
            again = ask_for_paris(server)
    ok = "Paris" in text and "Paris" in again and second_s <= SECOND_START_S
    figure = f"first start {first_s:.0f} s, second {second_s:.1f} s, answer {text.strip()!r}"
    return Result(ok, figure)


def ask_for_paris(server: Server) -> str:
    """Ask with curl, as the README does."""
    body = json.dumps({"inputs": QUESTION, "parameters": {"max_new_tokens": 32}})
    command = ["curl", "-sS", f"{server.url}/generate", "-d", body]
    answer = subprocess.run(
        [*command, "-H", "Content-Type: application/json"], capture_output=True, check=True
    )
    return str(json.loads(answer.stdout)["generated_text"])


def point_make_test() -> Result:
    """make test in a fresh clone."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        clone = fresh_clone(folder)
        start = time.perf_counter()
        run = subprocess.run(
            ["make", "test"], cwd=clone, env=clean_environment(folder / "home"),
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        minutes = (time.perf_counter() - start) / 60
    lines = run.stdout.splitlines()
    told = ("FAILED", "ERROR", "E   ")
    print("\n".join(line for line in lines if line.startswith(told)), flush=True)
    summary = [line for line in lines if " passed" in line or " failed" in line]
    figure = f"exit {run.returncode}, {minutes:.1f} minutes, {' and '.join(summary) or run.stderr[-300:]}"
    return Result(run.returncode == 0 and minutes <= 12, figure)


# --- 2, 4: equality with transformers -------------------------------------------


class Prompts:
    """Texts of wanted token counts, cut from the sources of the standard library."""

    def __init__(self, model_dir: Path, seed: int) -> None:
        self.tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
        folder = Path(json.__file__).parents[1]
        names = ("argparse.py", "textwrap.py", "difflib.py", "email/message.py")
        corpus = "\n".join((folder / name).read_text() for name in names)
        self._ids = self.tokenizer.encode(corpus).ids
        self._random = random.Random(seed)

    def make(self, num_tokens: int) -> tuple[str, list[int]]:
        """Return a text and its ids; their number is about ``num_tokens``."""
        start = self._random.randrange(len(self._ids) - num_tokens)
        text = self.tokenizer.decode(
            self._ids[start : start + num_tokens], skip_special_tokens=False
        )
        text = text or "a"
        return text, self.tokenizer.encode(text).ids


def ask(server: Server, text: str, ids: list[int], parameters: dict[str, Any]) -> Served:
    """Generate once with details."""
    body = {"inputs": text, "parameters": parameters | {"details": True}}
    details = server.post("/generate", body, timeout_s=1800)["details"]
    if details["prompt_tokens"] != len(ids):
        raise AssertionError(f"{details['prompt_tokens']} prompt tokens, expected {len(ids)}")
    tokens = details["tokens"]
    return Served(ids, [t["id"] for t in tokens], [t["logprob"] for t in tokens])


def ask_all(
    server: Server, jobs: list[tuple[str, list[int], dict[str, Any]]], spread_s: float
) -> list[Served]:
    """Send all jobs from threads of their own, starts spread over some seconds."""
    answers: list[Served | Exception | None] = [None] * len(jobs)

    def work(index: int) -> None:
        time.sleep(spread_s * index / len(jobs))
        try:
            answers[index] = ask(server, *jobs[index])
        except Exception as error:
            answers[index] = error

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for answer in answers:
        if not isinstance(answer, Served):
            raise AssertionError(f"a request failed: {answer}")
    return [answer for answer in answers if isinstance(answer, Served)]


def metric(server: Server, name: str) -> float:
    """Return the value of an unlabelled metric."""
    found = re.search(rf"^{name} ([0-9.e+]+)$", server.get("/metrics"), re.MULTILINE)
    if found is None:
        raise AssertionError(f"no metric {name}")
    return float(found.group(1))


def point_token_equality() -> Result:
    """64 concurrent requests against transformers alone."""
    model_dir = default_model_dir()
    prompts = Prompts(model_dir, seed=2)
    rng = random.Random(64)
    jobs = []
    for index in range(64):
        num_prompt = (1, 1500, rng.randint(2, 1400), rng.randint(2, 200))[index % 4]
        if index % 4 == 1 and index > 8:
            num_prompt = rng.randint(200, 900)
        parameters = {
            "max_new_tokens": rng.randint(1, 200),
            "ignore_eos_token": index % 2 == 0,
            "temperature": 0.0 if index % 8 == 0 else None,
        }
        jobs.append((*prompts.make(num_prompt), parameters))
    options = ("--num-blocks", "220", "--max-batch-prefill-tokens", "192")
    with Server(*options) as server:
        answers = ask_all(server, jobs, spread_s=20)
        preempted = metric(server, "lorax_requests_preempted")
    verdict = Reference(model_dir).check_greedy(answers)
    lengths = [len(served.prompt_ids) for served in answers]
    figure = f"{verdict}; prompts {min(lengths)} to {max(lengths)}, {preempted:.0f} preemptions"
    return Result(verdict.ok and preempted > 0, figure)


SAMPLERS: list[dict[str, Any]] = [
    {"temperature": 0.8},
    {"temperature": 1.2, "top_k": 40},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 0.7, "typical_p": 0.9},
    {"temperature": 1.0, "repetition_penalty": 1.2, "top_k": 50},
    {"temperature": 0.9, "frequency_penalty": 0.5, "presence_penalty": 0.3},
    {"temperature": 1.1, "min_p": 0.05},
    {"temperature": 0.9, "top_k": 30, "top_p": 0.95},
]


def point_seeded_sampling() -> Result:
    """Seeded draws of the real model: alone, in a batch of 32, across preemptions."""
    model_dir = default_model_dir()
    prompts = Prompts(model_dir, seed=4)
    jobs = []
    for index in range(32):
        sampling = SAMPLERS[index % len(SAMPLERS)] | {"seed": 1000 + index}
        parameters = {"max_new_tokens": 64, "ignore_eos_token": True, "do_sample": True}
        jobs.append((*prompts.make(20 + 3 * index), parameters | sampling))
    with Server() as server:
        alone = [ask(server, *job) for job in jobs[:8]]
        batch = ask_all(server, jobs, spread_s=0)
    with Server("--num-blocks", "64", "--max-batch-prefill-tokens", "64") as server:
        squeezed = ask_all(server, jobs, spread_s=0)
        preempted = metric(server, "lorax_requests_preempted")
    for runs in (alone, batch, squeezed):
        for served, job in zip(runs, jobs, strict=False):
            served.parameters = {
                key: value for key, value in job[2].items()
                if key not in ("max_new_tokens", "ignore_eos_token", "do_sample")
            }  # fmt: skip
    verdict = Reference(model_dir).check_draws([*alone, *batch, *squeezed])
    same = sum(a.output_ids == b.output_ids for a, b in zip(batch, squeezed, strict=True))
    same_alone = sum(a.output_ids == b.output_ids for a, b in zip(alone, batch, strict=False))
    figure = (
        f"{verdict}; equal alone and in the batch {same_alone}/8, "
        f"batch and preempted {same}/32, {preempted:.0f} preemptions"
    )
    return Result(verdict.ok and preempted > 0, figure)


# --- points that a test file measures -------------------------------------------


def run_tests(*arguments: str, env: dict[str, str] | None = None) -> Result:
    """Run pytest on some files, slow tests included; the figure is what they print with FIGURE and the summary."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", "-m", "", *arguments],
        cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ | (env or {}),
    )  # fmt: skip
    figures = figures_of(run.stdout)
    summary = [line for line in run.stdout.splitlines() if re.search(r"\d+ passed|failed", line)]
    if run.returncode:
        print(run.stdout[-4000:])
    return Result(run.returncode == 0, "; ".join([*figures, *summary[-1:]]))


def point_tiny_models() -> Result:
    """Tiny models of five families: logits, and planted faults."""
    return run_tests("tests/integration/test_model_parity.py")


def point_exact_sampling() -> Result:
    """Bit for bit on batch-invariant models; chi-square of the sampler."""
    return run_tests(
        "tests/integration/test_seeded_sampling.py",
        "tests/unit/sampling/test_sampler_distribution.py",
    )


def point_published_interface() -> Result:
    """A client that knows only LoRAX's published interface drives a shard."""
    return run_tests("tests/integration/test_shard_rpc.py")


def point_state_machine() -> Result:
    """The hypothesis state machine, at least 2,000 steps at each depth."""
    return run_tests(
        "tests/unit/core/test_scheduler_machine.py", env={"LORAX_MACHINE_STEPS": "2000"}
    )


# --- 5: lorax-client from PyPI ----------------------------------------------------


def point_lorax_client() -> Result:
    """lorax-client 0.6.3, unmodified, in an environment of its own."""
    with tempfile.TemporaryDirectory() as name:
        venv.create(name, with_pip=True)
        python = str(Path(name) / "bin" / "python")
        subprocess.run([python, "-m", "pip", "install", "-q", "lorax-client==0.6.3"], check=True)
        script = ROOT / "tests" / "helpers" / "lorax_client_session.py"
        with Server() as server:
            run = subprocess.run(
                [python, str(script), server.url], capture_output=True, text=True, check=False
            )
    print(run.stdout, run.stderr[-2000:])
    return Result(run.returncode == 0, (run.stdout.splitlines() or ["no output"])[-1])


# --- 8, 9: benchmarks ---------------------------------------------------------------


def run_bench(name: str, *arguments: str) -> dict[str, Any]:
    """Run a benchmark and return its figures."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figures.json"
        module = ["-m", f"bench.{name}", "--json", str(path), *arguments]
        subprocess.run([sys.executable, *module], cwd=ROOT, check=True)
        figures: dict[str, Any] = json.loads(path.read_text())
    return figures


def point_router_speed() -> Result:
    """Planning, and reply in to next request out."""
    figures = run_bench("router")
    plan_ms, turn_ms = figures["plan_ms_p50"], figures["turnaround_ms_p50"]
    ok = max(plan_ms.values()) < 1.0 and max(turn_ms.values()) < 2.0
    return Result(ok, f"plan {plan_ms} ms, reply to next request {turn_ms} ms (by depth)")


POINTS = [
    Point("1", "fresh clone: make serve answers, second start within 20 s", point_fresh_clone),
    Point("1t", "fresh clone: make test passes within 12 minutes", point_make_test),
    Point("2", "token equality of 64 concurrent requests", point_token_equality),
    Point("3", "tiny models: logits within 1e-4, planted faults caught", point_tiny_models),
    Point("4", "seeded sampling of the real model", point_seeded_sampling),
    Point("4x", "seeded sampling bit for bit; chi-square", point_exact_sampling),
    Point("5", "lorax-client 0.6.3 works unmodified", point_lorax_client),
    Point("6", "LoRAX's published interface drives a shard", point_published_interface),
    Point("7", "state machine of the scheduler, 2,000 steps at each depth", point_state_machine),
    Point("8", "plan < 1 ms, turnaround < 2 ms at 256 rows", point_router_speed),
    Point(
        "9", "W1 at least 2x transformers' static batches of 8", at_least(2.0, "static", *STATIC)
    ),
]
