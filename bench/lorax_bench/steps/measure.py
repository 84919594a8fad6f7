"""Times steps of a shard's engine and their parts, and libraries' products beside them, in turns."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from lorax_bench.steps.engine import DecodingRows, Prompts
from lorax_bench.steps.floor import LIBRARIES, Library, read_seconds
from lorax_bench.steps.wire import messages_seconds, scheduler_seconds
from lorax_contract.errors import StartupError
from lorax_contract.step import StepOutcome
from lorax_shard.engine import computation, forward
from lorax_shard.engine.engine import Engine

_KERNELS = {
    "lorax_attend": "attention",
    "lorax_store": "keys and values stored",
    "lorax_rms_norm": "norms",
    "lorax_gated": "gates",
    "lorax_rotate": "rotations",
    "lorax_lora_apply": "adapters",
}
# The second one computes gates with the product before them.
_PRODUCTS = ("_linear", "_panel_gated")
LINEARS, HEAD, SUMS, REST = "linears", "head", "sums and copies", "the rest of the pass"
LAID_OUT, DRAWN, ENGINE = "the pass laid out", "tokens drawn", "the rest of the engine"
PARTS = (LINEARS, *_KERNELS.values(), HEAD, SUMS, REST, LAID_OUT, DRAWN, ENGINE)


@dataclass(slots=True)
class MeasuredStep:
    """One kind of step: its seconds, round by round, and those of its parts."""

    name: str
    tokens: int
    logits: int
    step: list[float] = field(default_factory=list)
    parts: dict[str, float] = field(default_factory=dict)
    # The products of a step by each library.
    libraries: dict[str, list[float]] = field(default_factory=dict)
    # Weights, and keys and values, through memory.
    weights_s: float = 0.0
    kv_s: float = 0.0
    # Beside the step: its messages, and the router's plan and booking.
    beside: dict[str, float] = field(default_factory=dict)

    @property
    def step_s(self) -> float:
        """The median."""
        return statistics.median(self.step)

    @property
    def products_s(self) -> float:
        """The best library's median."""
        return min(map(statistics.median, self.libraries.values()))

    @property
    def floor_s(self) -> float:
        """What the step cannot beat."""
        return max(self.weights_s, self.products_s) + self.kv_s

    @property
    def ratios(self) -> list[float]:
        """The step over its floor, round by round."""
        rounds = zip(*self.libraries.values(), strict=True)
        floors = [max(self.weights_s, min(each)) + self.kv_s for each in rounds]
        return [step / floor for step, floor in zip(self.step, floors, strict=True)]


class StepBench:
    """An engine that is ready, and libraries' copies of its model's weights."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        inner: Any = engine.model._model  # type: ignore[attr-defined]
        libraries = (_library(name, inner) for name in LIBRARIES)
        self._libraries = [each for each in libraries if each is not None]
        self._read_s = read_seconds()

    def run(
        self,
        rows: Sequence[int],
        prompts: Sequence[int],
        *,
        context: int,
        rounds: int,
        calls: int,
    ) -> list[MeasuredStep]:
        """Time steps of so many rows, and of prompts of so many tokens: of each round a median of calls."""
        steps = [self._new(f"{each} rows", each, each, each * context) for each in rows]
        steps += [self._new(f"prompt of {each}", each, 1, each) for each in prompts]
        with torch.inference_mode():
            for _ in range(rounds):
                for step in steps:
                    step.step.append(_timed(self._steps(step, context), calls))
                    for library in self._libraries:
                        seconds = step.libraries.setdefault(library.name, [])
                        seconds.append(_timed(library.call(step.tokens, step.logits), calls))
            for step in steps:
                step.parts = self._parts(self._steps(step, context), calls)
                step.beside = messages_seconds(step.logits) | scheduler_seconds(step.logits)
        return steps

    def _new(self, name: str, tokens: int, logits: int, cached: int) -> MeasuredStep:
        model = self._engine.model
        step = MeasuredStep(name, tokens, logits)
        step.weights_s = model.weight_bytes * self._read_s
        step.kv_s = cached * model.block_bytes(16) / 16 * self._read_s
        return step

    def _steps(self, step: MeasuredStep, context: int) -> Callable[[], StepOutcome]:
        """Return what computes one such step after the other."""
        if step.logits < step.tokens:
            return Prompts(self._engine, step.tokens)
        return DecodingRows(self._engine, step.tokens, context)

    def _parts(self, compute: Callable[[], StepOutcome], calls: int) -> dict[str, float]:
        """Return the seconds of each part; of kernels none, where no program computes the pass."""
        programs: Any = self._engine.model.graphs
        timed = None if programs is None else programs.time_kernels(with_adapters=False)
        with _clock() as seconds:
            started = time.perf_counter()
            for _ in range(calls):
                compute()
            whole = time.perf_counter() - started
        parts = dict.fromkeys(PARTS, 0.0)
        if timed is not None:
            names, of_kernels = timed
            linears = [index for index, name in enumerate(names) if name.endswith(_PRODUCTS)]
            for index, name in enumerate(names):
                part = LINEARS if index in linears else _KERNELS.get(name, SUMS)
                parts[HEAD if index == linears[-1] else part] += float(of_kernels[index])
        parts[LAID_OUT], parts[DRAWN] = seconds["build_inputs"], seconds["draw"]
        parts[REST] = (
            seconds["run_pass"] - parts[LAID_OUT] - sum(parts[each] for each in PARTS[:-4])
        )
        parts[ENGINE] = whole - seconds["run_pass"] - parts[DRAWN]
        return {name: each / calls for name, each in parts.items()}


@contextmanager
def _clock() -> Iterator[dict[str, float]]:
    """Within, the seconds that some functions of the engine take are added up by their names."""
    seconds: dict[str, float] = defaultdict(float)
    functions = ((forward, "build_inputs"), (computation, "run_pass"), (computation, "draw"))
    own = [getattr(module, name) for module, name in functions]

    def timed(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[name] += time.perf_counter() - started

        return run

    for (module, name), function in zip(functions, own, strict=True):
        setattr(module, name, timed(function, name))
    try:
        yield seconds
    finally:
        for (module, name), function in zip(functions, own, strict=True):
            setattr(module, name, function)


def _library(name: str, model: Any) -> Library | None:
    try:
        return Library(name, model)
    except StartupError:
        return None


def _timed(call: Callable[[], object], calls: int) -> float:
    call()
    seconds = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
