"""lm-eval's ``local-completions``, unmodified, beside what transformers and PEFT compute directly.

Its tasks lie in ``lm_eval_tasks``: pairs of a context and its continuation, choices, whole texts
(some longer than its window) and questions to be answered greedily. What it asks and how it cuts
contexts into tokens is its own; the reference reads both from the log of its requests.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tests.acceptance.environments import environment, run_program
from tests.acceptance.harness import SHARED, Point, Result
from tests.acceptance.suites import ROOT
from tests.helpers.default_model import default_model_dir
from tests.helpers.server import Server

TASKS = Path(__file__).with_name("lm_eval_tasks")
ADAPTERS = ROOT / "examples/adapters"
NAMES = ("pairs", "choices", "texts", "questions")
REQUIREMENTS = ("lm-eval[api]", "transformers")
# Of its requests; it asks for one token less, and leaves room for the one that it generates.
MAX_LENGTH = 1024
MAX_DIFFERENCE = 1e-3
BOUND_S = 1200.0
# How it asks: ids, a request each, at the same time; texts, several in a request.
WAYS = {
    "ids": (("tokenized_requests=True", "num_concurrent=8"), "1"),
    "lists of ids": (("tokenized_requests=True", "num_concurrent=1"), "4"),
    "texts": (("tokenized_requests=False", "num_concurrent=1"), "4"),
}


class Direct:
    """The stock model, alone or with an adapter, one request at a time, float32.

    The same is asked in several ways: it is computed once.
    """

    def __init__(self, adapter: Path | None) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder = default_model_dir()
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        if adapter is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, adapter)
        self._model = model.eval()
        self.pair = functools.cache(self._pair)
        self.text = functools.cache(self._text)
        self.answer = functools.cache(self._answer)

    def _pair(self, context: str, continuation: str) -> tuple[float, bool]:
        """Return the log-likelihood of a continuation, and whether it is the greedy one."""
        if not context:
            ids = self._ids(continuation)
            start = self._tokenizer.bos_token_id
            return self._score([start], ids) if ids[0] != start else self._score(ids[:1], ids[1:])
        # Spaces at its end belong to the continuation.
        head = context.rstrip()
        whole = self._ids(context + continuation)
        num_context = len(self._ids(head))
        return self._score(whole[:num_context], whole[num_context:])

    def _text(self, text: str) -> float:
        """Return the log-likelihood of a whole text, a window after another."""
        ids, most = self._ids(text), MAX_LENGTH - 2
        total = 0.0
        for begin in range(0, len(ids), most):
            part = ids[begin : begin + most]
            # The first follows the start alone; a short last one is preceded by as much as fits.
            first = max(0, begin + len(part) - most - 1)
            before = ids[first:begin] if begin else [self._tokenizer.bos_token_id]
            total += self._score(before, part)[0]
        return total

    def _answer(self, question: str, stops: tuple[str, ...], max_tokens: int) -> str:
        """Return the greedy answer up to a stop string."""
        ids = torch.tensor([self._ids(question)])
        with torch.inference_mode():
            output = self._model.generate(
                input_ids=ids, max_new_tokens=max_tokens, do_sample=False,
                attention_mask=torch.ones_like(ids),
            )  # fmt: skip
        text = self._tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        return text[: min((text.find(each) for each in stops if each in text), default=len(text))]

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False).input_ids

    def _score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        ids = torch.tensor([(context + continuation)[-(MAX_LENGTH - 1) :]])
        num = len(continuation)
        with torch.inference_mode():
            answer = self._model(input_ids=ids, use_cache=False, logits_to_keep=num + 1)
        logits = answer.logits[0, :-1]
        chosen = torch.tensor(continuation)
        scores = logits.log_softmax(dim=-1).gather(1, chosen[:, None])
        return float(scores.sum()), bool((logits.argmax(dim=-1) == chosen).all())


@dataclass(slots=True)
class Comparison:
    """How what it logged compares."""

    num: int = 0
    num_greedy: int = 0
    num_texts: int = 0
    largest: float = 0.0
    wrong: list[str] = field(default_factory=list)

    def add_value(self, asked: str, found: float, expected: float) -> None:
        self.num += 1
        self.largest = max(self.largest, abs(found - expected))
        if not abs(found - expected) <= MAX_DIFFERENCE:
            self.wrong.append(f"{asked}: {found}, not {expected}")

    def add_greedy(self, asked: str, found: bool, expected: bool) -> None:
        self.num_greedy += expected
        if found is not expected:
            self.wrong.append(f"{asked}: is_greedy is {found}")

    def add_text(self, asked: str, found: str, expected: str) -> None:
        self.num_texts += 1
        if found != expected:
            self.wrong.append(f"{asked}: {found!r}, not {expected!r}")


def logged(folder: Path, name: str) -> Iterator[tuple[list[Any], Any]]:
    """Return the arguments of each of its requests, and what it made of the answer."""
    (path,) = folder.glob(f"*/samples_lorax_{name}_*.jsonl")
    for line in path.read_text().splitlines():
        sample = json.loads(line)
        for asked, (answer,) in zip(sample["arguments"].values(), sample["resps"], strict=True):
            yield [*asked.values()], answer


def compared(direct: Direct, folder: Path) -> Comparison:
    """Compare all that it logged with the reference."""
    found = Comparison()
    for asked, (value, is_greedy) in itertools.chain(
        logged(folder, "pairs"), logged(folder, "choices")
    ):
        expected, greedy = direct.pair(*asked)
        shown = f"{asked[0][-40:]!r} + {asked[1]!r}"
        found.add_value(shown, float(value), expected)
        found.add_greedy(shown, is_greedy == "True", greedy)
    for (text,), value in logged(folder, "texts"):
        found.add_value(repr(text[:40]), float(value), direct.text(text))
    for (question, options), text in logged(folder, "questions"):
        expected = direct.answer(question, (*options["until"],), options["max_gen_toks"])
        found.add_text(repr(question), text, expected)
    return found


async def run_tasks(programs: Path, url: str, model: str, way: str, out: Path) -> None:
    """Have it run its tasks; raises when it fails."""
    options, batch_size = WAYS[way]
    arguments = (
        f"model={model}", f"base_url={url}/v1/completions", f"tokenizer={default_model_dir()}",
        f"max_length={MAX_LENGTH}", "max_retries=1", *options,
    )  # fmt: skip
    code, output = await run_program(
        str(programs / "lm_eval"), "run", "--model", "local-completions",
        "--model_args", ",".join(arguments), "--batch_size", batch_size,
        "--include_path", ".", "--tasks", ",".join(f"lorax_{name}" for name in NAMES),
        "--log_samples", "--output_path", str(out),
        timeout_s=BOUND_S, cwd=TASKS,
        env={
            **os.environ, "HF_HOME": str(out / "cache"), "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
        },
    )  # fmt: skip
    if code:
        print(output[-6000:])
        raise RuntimeError(f"lm-eval ended with {code}")


@functools.cache
def programs() -> Path:
    """Return the folder of its programs, in an environment that all points share."""
    return SHARED.enter_context(environment(*REQUIREMENTS))


def _point(model: str, adapter: Path | None) -> Result:
    """Compare all ways of asking for one model."""
    direct, parts, ok = Direct(adapter), [], True
    options = ("--served-model-name", "base", "--adapter-local-root", str(ADAPTERS))
    with Server(*options) as server:
        for way in WAYS:
            with tempfile.TemporaryDirectory() as name:
                asyncio.run(run_tasks(programs(), server.url, model, way, Path(name)))
                found = compared(direct, Path(name))
            print("".join(f"    {way}: {each}\n" for each in found.wrong), end="", flush=True)
            ok = ok and not found.wrong and found.num > 0 and found.num_texts > 0
            parts.append(
                f"{way}: {found.num} log-likelihoods at most {found.largest:.1e} apart, "
                f"{found.num_greedy} greedy, {found.num_texts} answers, {len(found.wrong)} wrong"
            )
    return Result(ok, "; ".join(parts))


POINTS = [
    Point(
        "2b",
        "lm-eval's local-completions beside transformers, the base",
        lambda: _point("base", None),
    ),
    Point(
        "2a",
        "lm-eval's local-completions beside PEFT, an adapter",
        lambda: _point("local:pirate", ADAPTERS / "pirate"),
    ),
]
