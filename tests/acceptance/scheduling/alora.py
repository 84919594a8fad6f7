"""Adapters that are invoked behind a prompt: exact, and the prompt is computed once for all."""

from __future__ import annotations

import json
import random
import tempfile
from contextlib import ExitStack
from pathlib import Path

import torch
from tests.acceptance.adapter_fleet import (
    MAX_DIFFERENCE,
    Adapter,
    PeftReference,
    Stream,
    run_streams,
    serve,
)
from tests.acceptance.harness import Point, Result
from tests.acceptance.reference import Served
from tests.acceptance.serve import Prompts, run_bench, run_tests
from tests.helpers.default_model import default_model_dir
from tests.helpers.formula_adapters import write_formula_adapter
from tests.helpers.hub_stub import StubHub, running_hub

from lorax_contract.activation import NEVER, activation_start

MARKS = ("<|im_start|>judge", "<|im_start|>tag", "<|im_end|>")
NUM_INVOKED, NUM_ORDINARY, NUM_REQUESTS = 6, 2, 60
# How much further answers are from the base model's than from PEFT's.
MIN_SHOWN = 100
# Twenty adapters over one prompt take so much of one's time at most.
MAX_FAN = 1.5
# Without sharing they take so many times as long at least.
MIN_SAVED = 5.0


class InvokedReference(PeftReference):
    """PEFT, which looks for the invocation in the prompt alone, as it does to generate."""

    def logits(self, served: Served) -> torch.Tensor:
        """Return the logits that chose each output token: outputs x vocabulary."""
        config = getattr(self._model, "peft_config", {}).get("default")
        mark = getattr(config, "alora_invocation_tokens", None)
        if not mark:
            return super().logits(served)
        known = [*served.prompt_ids, *served.output_ids[:-1]]
        start = activation_start(served.prompt_ids, mark)
        offset = None if start == NEVER else len(known) - start
        num = len(served.output_ids)
        with torch.inference_mode():
            logits = self._model(
                torch.tensor([known]), logits_to_keep=num, use_cache=False, alora_offsets=[offset]
            ).logits
        return logits[0].float()


def make_adapters(model_dir: Path, root: Path, prompts: Prompts) -> list[tuple[Adapter, str]]:
    """Make adapters of both kinds; with each the text that invokes it."""
    made = []
    for number in range(NUM_INVOKED + NUM_ORDINARY):
        mark = MARKS[number % len(MARKS)] if number < NUM_INVOKED else ""
        folder = write_formula_adapter(
            model_dir, root / f"adapter-{number}", rank=4 << number % 3, seed=number,
            invocation=prompts.tokenizer.encode(mark).ids,
        )  # fmt: skip
        made.append((Adapter(str(folder), "local", folder), mark))
    return made


def make_streams(prompts: Prompts, adapters: list[tuple[Adapter, str]]) -> list[Stream]:
    """Return requests whose prompts invoke their adapter once, twice, at the end or never."""
    rng = random.Random(7)
    shared = prompts.make(120)[0]
    streams = []
    for number in range(NUM_REQUESTS):
        adapter, mark = adapters[number % len(adapters)]
        begin = shared if number % 2 else prompts.make(rng.randint(8, 60))[0]
        end = prompts.make(rng.randint(2, 20))[0]
        ends = [mark + end, f"{mark}{end}{mark}", mark + end, end]
        # The first of each adapter shows that it acts.
        text = begin + (ends[0] if number < len(adapters) else rng.choice(ends))
        parameters = {"max_new_tokens": rng.randint(4, 16), "ignore_eos_token": True}
        ids = prompts.tokenizer.encode(text).ids
        streams.append(Stream(text, ids, parameters, adapter))
    return streams


def point_exact() -> Result:
    """Several of them, ordinary adapters and the base model in one batch, against PEFT."""
    tiny = run_tests("tests/integration/test_activated_adapters.py")
    if not tiny.ok:
        return tiny
    model_dir = default_model_dir()
    prompts = Prompts(model_dir, seed=3)
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        hub = stack.enter_context(running_hub(StubHub()))
        adapters = make_adapters(model_dir, root / "adapters", prompts)
        streams = make_streams(prompts, adapters)
        base = [Stream(each.text, each.ids, each.parameters) for each in streams[:6]]
        with serve(hub, root / "adapters", root / "store") as server:
            run_streams(server.url, [*streams, *base], spread_s=5)
        failed = [each for each in (*streams, *base) if each.error or not each.tokens]
        if failed:
            return Result(False, f"{len(failed)} requests failed: {failed[0].error[:200]}")
        reference = InvokedReference(model_dir)
        base_verdict = reference.check_greedy([each.served for each in base])
        verdict, _ = reference.judge(streams)
        # The first of each adapter, which is invoked: adapters that do nothing would prove nothing.
        shown = min(
            reference.check_greedy([each.served]).max_difference
            for each in streams[: len(adapters)]
        )
    ok = verdict.ok and base_verdict.ok and verdict.max_difference <= MAX_DIFFERENCE
    figure = (
        f"{verdict}; base: {base_verdict}; adapters are at least {shown:.1e} from the base; "
        f"tiny: {tiny.figure}"
    )
    return Result(ok and shown > MIN_SHOWN * verdict.max_difference, figure)


def point_fan_out() -> Result:
    """One prompt of 2,000 tokens to 1, 5 and 20 adapters."""
    figures = run_bench("fan_out")
    ok = figures["twenty_to_one"] <= MAX_FAN and figures["ordinary_to_invoked"] >= MIN_SAVED
    return Result(ok, json.dumps(figures))


POINTS = [
    Point("5", "invoked adapters equal PEFT in mixed batches", point_exact),
    Point("5f", "twenty adapters over one prompt take little more than one", point_fan_out),
]
