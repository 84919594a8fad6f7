"""Scores over HTTP against transformers' and PEFT's own: classifiers with many heads, and rankings."""

from __future__ import annotations

import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from tests.acceptance.encoders.vectors import embedding_model, mixed_texts
from tests.acceptance.harness import Result
from tests.acceptance.suites import run_suite
from tests.helpers.peft_folders import quiet, randomise
from tests.helpers.server import Server

NUM_ADAPTERS, NUM_TEXTS, TOLERANCE = 30, 8, 1e-4
LINEARS = ("query", "key", "value", "dense")
_TASKS = {
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
    "TOKEN_CLS": transformers.AutoModelForTokenClassification,
}
# Faults that the list names, and the tests that plant them.
_PARITY = "tests/integration/test_encoder_parity.py"
PLANTED = (
    f"{_PARITY}::test_a_planted_fault_is_found",
    f"{_PARITY}::test_attention_without_a_kernel_sees_nothing_of_what_fills_rows_up",
    "tests/integration/test_heads.py::test_a_wrong_head_is_found",
)
FAULTS = (
    "pooling takes a neighbour's token", "what fills rows up", "positions shifted", "wrong head"
)  # fmt: skip


def task_of(number: int) -> str:
    """Return what an adapter is for: each fifth one classifies tokens."""
    return "TOKEN_CLS" if number % 5 == 4 else "SEQ_CLS"


def bare_model(model: Path, number: int) -> Any:
    """Return the model under an adapter, with as many labels as that has."""
    with quiet():
        labels = {"num_labels": 2 + number % 6}
        return _TASKS[task_of(number)].from_pretrained(model, **labels)


def save_adapters(model: Path, folder: Path) -> list[str]:
    """Make adapters with heads of different kinds and widths, with random weights."""
    names = [f"kind-{number}" for number in range(NUM_ADAPTERS)]
    for number, name in enumerate(names):
        torch.manual_seed(number)
        targets: Any = [["query", "value"], ["key", "dense"], "all-linear"][number % 3]
        if task_of(number) == "TOKEN_CLS" and targets == "all-linear":
            # PEFT itself fails there: it would adapt the head that it saves.
            targets = [*LINEARS]
        with quiet():
            config = LoraConfig(
                task_type=task_of(number), target_modules=targets, r=2 + number % 7,
                use_dora=number % 4 == 1,
            )  # fmt: skip
            tuned = get_peft_model(bare_model(model, number), config)
            randomise(tuned, "none", number)
            shrink(tuned)
            tuned.save_pretrained(folder / name)
    return names


@torch.no_grad()
def shrink(tuned: torch.nn.Module) -> None:
    """Bring low-rank parts to the size that training gives them.

    Of much larger ones PEFT's own scores differ by more than is asked here, as soon as it computes
    them in another order.
    """
    for name, parameter in tuned.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            parameter.mul_(0.2)


@torch.no_grad()
def expected_scores(model: Path, folder: Path, texts: list[str]) -> list[list[torch.Tensor]]:
    """Return PEFT's scores of each text alone, by adapter."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    found = []
    for number in range(NUM_ADAPTERS):
        with quiet():
            tuned = PeftModel.from_pretrained(
                bare_model(model, number), folder / f"kind-{number}"
            ).eval()
        encoded = [tokenizer(text, return_tensors="pt") for text in texts]
        found.append([tuned(**each).logits[0].float() for each in encoded])
    return found


def difference_of(answer: Any, scores: torch.Tensor) -> float:
    """Return how far an answer's scores are from those of a text, or of its tokens."""
    if scores.dim() == 1:
        by_label = {each["label"]: each["score"] for each in answer}
        found = torch.tensor([by_label[f"LABEL_{n}"] for n in range(len(scores))])
        return float((found - scores.softmax(-1)).abs().max())
    return _entity_difference(answer, scores[1:-1].softmax(-1))


def _entity_difference(answer: list[dict[str, Any]], shares: torch.Tensor) -> float:
    """Compare entities with runs of the likeliest label: of labels without B- and I- one for each run."""
    runs: list[tuple[str, list[float]]] = []
    for share, label in zip(*(each.tolist() for each in shares.max(-1)), strict=True):
        if not runs or runs[-1][0] != f"LABEL_{label}":
            runs.append((f"LABEL_{label}", []))
        runs[-1][1].append(share)
    if [each["entity_group"] for each in answer] != [name for name, _ in runs]:
        return float("inf")
    means = [sum(values) / len(values) for _, values in runs]
    pairs = zip(answer, means, strict=True)
    return max(abs(each["score"] - mean) for each, mean in pairs)


def point_scores() -> Result:
    """All adapters at once over HTTP, on one rank and on three, against PEFT of each text alone."""
    texts = [text for text in mixed_texts() if len(text) > 3][:NUM_TEXTS]
    with embedding_model() as model, tempfile.TemporaryDirectory() as name:
        names = save_adapters(model, Path(name))
        expected = expected_scores(model, Path(name), texts)
        worst = 0.0
        for num_ranks in ("1", "3"):
            options = ("--adapter-local-root", name, "--default-adapter-source", "local")
            with (
                Server("--model-id", str(model), "--num-shard", num_ranks, *options) as server,
                ThreadPoolExecutor(24) as pool,
            ):

                def ask(at: tuple[int, int], server: Server = server) -> Any:
                    body = {"inputs": texts[at[1]], "parameters": {"adapter_id": names[at[0]]}}
                    return server.post("/classify", body)

                places = [(a, t) for t in range(len(texts)) for a in range(NUM_ADAPTERS)]
                for at, answer in zip(places, pool.map(ask, places), strict=True):
                    worst = max(worst, difference_of(answer, expected[at[0]][at[1]]))
            print(f"    {num_ranks} ranks: {worst:.1e}")
    return Result(
        worst <= TOLERANCE,
        f"{NUM_ADAPTERS} adapters (heads of 2 to 7 labels, six for tokens), {len(texts)} texts, "
        f"1 and 3 ranks: largest difference of a probability {worst:.1e}",
    )


def point_ranking() -> Result:
    """A cross-encoder with random weights: scores of pairs against transformers' own, pair by pair."""
    query, *texts = [text for text in mixed_texts() if len(text) > 3][:20]
    with embedding_model() as model, tempfile.TemporaryDirectory() as name:
        torch.manual_seed(3)
        with quiet():
            crossed = transformers.AutoModelForSequenceClassification.from_pretrained(
                model, num_labels=1
            ).eval()
            tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        with torch.no_grad():
            crossed.classifier.weight.normal_(0, 0.3)
            pairs = [tokenizer(query, text, return_tensors="pt") for text in texts]
            wanted = [float(crossed(**pair).logits[0, 0].sigmoid()) for pair in pairs]
        crossed.save_pretrained(name)
        tokenizer.save_pretrained(name)
        with Server("--model-id", name) as server:
            ranked = server.post("/rerank", {"query": query, "texts": texts})
    scores = [each["score"] for each in ranked]
    worst = max(abs(each["score"] - wanted[each["index"]]) for each in ranked)
    ok = worst <= TOLERANCE and scores == sorted(scores, reverse=True) and len(ranked) == len(texts)
    return Result(ok, f"{len(texts)} texts, largest difference {worst:.1e}, best first")


def point_planted() -> Result:
    """The tests that plant faults, one by one, and find each."""
    run = run_suite(*PLANTED)
    passed = [name.replace("_", " ") for name, end in run.ends if end == "passed"]
    found = [fault for fault in FAULTS if any(fault in name for name in passed)]
    return Result(
        run.is_whole and len(found) == len(FAULTS),
        f"{len(passed)} tests passed, {run.counts['failed']} failed; found: {', '.join(found)}",
    )
