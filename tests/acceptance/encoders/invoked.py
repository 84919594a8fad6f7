"""One text through many causal adapters that a mark behind it invokes: what comes before is shared."""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

from tests.acceptance.encoders.speed import NUM_ADAPTERS, mixed_lengths, seconds_of
from tests.acceptance.harness import Result
from tests.helpers.default_model import default_model_dir
from tests.helpers.formula_adapters import write_formula_adapter
from tests.helpers.server import Server
from tokenizers import Tokenizer

MARK, ROUNDS = "<|im_start|>judge", 7


def point_invoked() -> Result:
    """One text of 600 tokens through 20 adapters that are invoked behind it, in one request."""
    model_dir = default_model_dir()
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    mark = tokenizer.encode(MARK).ids
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        folders = [
            str(write_formula_adapter(model_dir, root / f"{n}", rank=8, seed=n, invocation=mark))
            for n in range(NUM_ADAPTERS)
        ]
        options = ("--adapter-local-root", name, "--adapter-store-dir", str(root / "store"))
        with Server(*options) as server:

            def ask(adapters: list[str], number: int) -> list[str]:
                # Another text each time: nothing of it was computed before.
                text = " ".join(mixed_lengths(24, seed=number)) + MARK
                parameters = {"max_new_tokens": 4, "adapter_source": "local"}
                body = {"inputs": text, "parameters": parameters, "adapters": adapters}
                return [each.get("generated_text", "") for each in server.post("/generate", body)]

            answers = ask(folders, 0)
            ratios = []
            for number in range(1, 2 * ROUNDS, 2):
                one = seconds_of(lambda at=number: ask(folders[:1], at))
                ratios.append(seconds_of(lambda at=number: ask(folders, at + 1)) / one)
    middle = statistics.median(ratios)
    return Result(
        middle <= 2.0 and len(set(answers)) > 1 and all(answers),
        f"{NUM_ADAPTERS} adapters take {middle:.2f}x of one ({min(ratios):.2f} to "
        f"{max(ratios):.2f}; at most 2x); {len(set(answers))} different answers",
    )
