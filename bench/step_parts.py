"""Where the time of whole decode steps goes, part by part, on the embedded default model.

Each part is timed where it is called, less what it calls that is a part itself, so that the parts
of a step add up to the step. What is timed is found by the names of modules and methods, so that
the same script measures other revisions: run it with their code first on the path.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from bench.step import CONTEXT, make_engine
from tests.helpers.default_model import default_model_dir

from lorax_contract.step import (
    BlockId,
    NewRow,
    RequestId,
    RequestSpec,
    SamplingParams,
    StepPlan,
    StoppingParams,
)

PARTS = (
    "linears", "head", "attention", "K and V stored", "norms", "gates", "rotary, and shapes",
    "sums, and the model's own code", "laid out", "drawn", "collected", "the rest",
)  # fmt: skip
KINDS = {
    "greedy": SamplingParams(),
    "top-p": SamplingParams(do_sample=True, temperature=0.8, top_p=0.95, seed=7),
}


class Clock:
    """Sums up what each part took by itself."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inner = [0.0]

    def timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return the call with its time counted as a part's."""

        @functools.wraps(call)
        def run(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            start = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                took = time.perf_counter() - start
                self.seconds[part] += took - self._inner.pop()
                self._inner[-1] += took

        return run

    def wrap(self, owner: Any, name: str, part: str) -> None:
        """Time an attribute of an object, of a class or of a module of Python."""
        if hasattr(owner, name):
            setattr(owner, name, self.timed(part, getattr(owner, name)))


def part_of(name: str, module: torch.nn.Module, head: torch.nn.Module) -> str | None:
    """Return the part that a module of the model is."""
    kind = type(module).__name__
    if module is head:
        return "head"
    if "Linear" in kind:
        return "linears"
    if "Norm" in kind:
        return "norms"
    if kind.endswith("MLP") or "SiLU" in kind:
        return "gates"
    if "Rotary" in kind or kind.endswith("Attention"):
        return "rotary, and shapes"
    return (
        "sums, and the model's own code"
        if name == "" or "Layer" in kind or "Model" in kind
        else None
    )


def watch(engine: Any) -> Clock:
    """Time the parts of an engine's steps from now on."""
    clock, model = Clock(), engine.model._model
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if (part := part_of(name, module, head)) is not None:
            module.forward = clock.timed(part, module.forward)
    backend = engine.model._backend
    clock.wrap(backend, "store", "K and V stored")
    clock.wrap(backend, "attend", "attention")
    from lorax_shard.engine import forward

    clock.wrap(forward, "build_inputs", "laid out")
    sampler = getattr(engine, "computation", engine)
    for owner, name in ((sampler, "sampler"), (engine, "_sampler")):
        if getattr(owner, name, None) is not None:
            for method in ("draw", "sample"):
                clock.wrap(getattr(owner, name), method, "drawn")
            break
    for owner in (engine, getattr(engine, "computation", None)):
        clock.wrap(owner, "collect", "collected")
    clock.wrap(getattr(engine, "_emitter", None), "emit", "collected")
    return clock


class Rows:
    """Rows that decode for ever."""

    def __init__(self, engine: Any, num_rows: int, sampling: SamplingParams) -> None:
        engine.clear()
        self._engine, self._num_blocks, self._length = engine, 0, CONTEXT
        self._ids = [RequestId(index + 1) for index in range(num_rows)]
        plan = self._plan(CONTEXT, -(-CONTEXT // 16))
        for request_id in self._ids:
            spec = RequestSpec(
                request_id=request_id,
                prompt_ids=[(17 * request_id + 31 * p) % 40_000 + 100 for p in range(CONTEXT)],
                sampling=sampling,
                stopping=StoppingParams(max_new_tokens=4000, ignore_eos=True),
            )
            plan.new_rows.append(NewRow(spec, ()))
        engine.step(plan)

    def _plan(self, num_tokens: int, new_blocks: int) -> StepPlan:
        count = len(self._ids)
        plan = StepPlan(1, list(self._ids), [num_tokens] * count)
        plan.num_new_blocks = [new_blocks] * count
        first, self._num_blocks = self._num_blocks, self._num_blocks + new_blocks * count
        plan.new_blocks = [BlockId(block) for block in range(first, self._num_blocks)]
        return plan

    def decode(self) -> None:
        """Run one step."""
        plan = self._plan(1, int(self._length % 16 == 0))
        self._length += 1
        self._engine.step(plan)


def parts_of_steps(
    engine: Any, clock: Clock, num_rows: int, sampling: SamplingParams, num_steps: int
) -> dict[str, float]:
    """Return the median milliseconds of each part, and of the whole step."""
    rows = Rows(engine, num_rows, sampling)
    found: dict[str, list[float]] = defaultdict(list)
    for number in range(num_steps + 3):
        clock.seconds.clear()
        start = time.perf_counter()
        rows.decode()
        whole = time.perf_counter() - start
        if number >= 3:
            named = dict(clock.seconds)
            named["the rest"] = whole - sum(named.values())
            for part in PARTS:
                found[part].append(named.get(part, 0.0))
            found["a step"].append(whole)
    return {part: 1e3 * statistics.median(times) for part, times in found.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 32])
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    engine = make_engine(default_model_dir(), "auto", "auto")
    cases = [(rows, kind) for rows in options.rows for kind in KINDS]
    whole = {
        case: parts_of_steps(engine, Clock(), case[0], KINDS[case[1]], options.steps)
        for case in cases
    }
    clock = watch(engine)
    found = {
        case: parts_of_steps(engine, clock, case[0], KINDS[case[1]], options.steps)
        for case in cases
    }
    print("| part | " + " | ".join(f"{rows}, {kind}" for rows, kind in cases) + " |")
    print("| --- |" + " --- |" * len(cases))
    for part in (*PARTS, "a step"):
        print(f"| {part} | " + " | ".join(f"{found[case][part]:.2f}" for case in cases) + " |")
    print(
        "| a step, unwatched | "
        + " | ".join(f"{whole[case]['a step']:.2f}" for case in cases)
        + " |"
    )


if __name__ == "__main__":
    main()
