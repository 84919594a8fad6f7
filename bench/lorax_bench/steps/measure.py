"""Times steps and their parts, and a library's products beside them, in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lorax_bench.steps.floor import LIBRARIES, Library, read_seconds
from lorax_bench.steps.passes import decode_pass, num_blocks, prompt_pass
from lorax_contract.errors import StartupError
from lorax_shard.model.hf_model import HFPagedModel
from lorax_shard.model.interface import GraphSettings, PassNumbers
from lorax_shard.model.launch import launched

_PARTS = {
    "lorax_attend": "attention",
    "lorax_store": "keys and values stored",
    "lorax_rms_norm": "norms",
    "lorax_gated": "gates",
    "lorax_rotate": "rotations",
    "lorax_lora_apply": "adapters",
}
LINEARS, HEAD, SUMS, REST = "linears", "head", "sums and copies", "beside the kernels"
PARTS = (LINEARS, *_PARTS.values(), HEAD, SUMS, REST)


@dataclass(slots=True)
class MeasuredStep:
    """One kind of step: its times in seconds, round by round."""

    name: str
    tokens: int
    step: list[float] = field(default_factory=list)
    parts: dict[str, float] = field(default_factory=dict)
    # The products of a step by each library.
    libraries: dict[str, list[float]] = field(default_factory=dict)
    # Weights, and keys and values, through memory.
    weights_s: float = 0.0
    kv_s: float = 0.0

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
    """A model with programs of its passes, and libraries' copies of its weights."""

    def __init__(
        self, model: HFPagedModel, *, context: int, max_rows: int, max_tokens: int
    ) -> None:
        """Take a model that is loaded as a shard does; it gets a cache."""
        self.model, self.context = model, context
        self._block_size = 16
        blocks = max(
            num_blocks(max_rows, context, self._block_size), max_tokens // self._block_size + 1
        )
        model.allocate_cache(blocks, self._block_size)
        max_rank, max_slots = (16, 8) if model.lora is not None else (0, 0)
        model.capture_graphs(
            GraphSettings(
                max_rows=max_rows, max_context=max_tokens, max_rank=max_rank, max_slots=max_slots
            )
        )
        inner: Any = model._model
        self._libraries = [
            library for name in LIBRARIES if (library := _library(name, inner)) is not None
        ]
        self._read_s = read_seconds()

    def decode(self, num_rows: int) -> tuple[MeasuredStep, PassNumbers]:
        """Return a step of so many rows, not timed yet."""
        vocab_size = self.model.vocab_size
        numbers = decode_pass(num_rows, self.context, self._block_size, vocab_size)
        times = MeasuredStep(f"{num_rows} rows", num_rows)
        times.kv_s = self._kv_seconds(num_rows * self.context)
        return times, numbers

    def prompt(self, num_tokens: int) -> tuple[MeasuredStep, PassNumbers]:
        """Return a step of one prompt, not timed yet."""
        numbers = prompt_pass(num_tokens, self._block_size, self.model.vocab_size)
        times = MeasuredStep(f"prompt of {num_tokens}", num_tokens)
        times.kv_s = self._kv_seconds(num_tokens)
        return times, numbers

    def run(
        self, steps: Sequence[tuple[MeasuredStep, PassNumbers]], rounds: int, calls: int
    ) -> None:
        """Time all steps and their libraries' products, in turns; of each round the median of some calls."""
        products = {
            id(times): {
                library.name: library.call(times.tokens, len(numbers.logit_rows))
                for library in self._libraries
            }
            for times, numbers in steps
        }
        for times, _ in steps:
            times.weights_s = self.model.weight_bytes * self._read_s
        with torch.inference_mode():
            for _ in range(rounds):
                for times, numbers in steps:
                    times.step.append(_timed(lambda n=numbers: self._compute(n), calls))  # type: ignore[misc]
                    for name, call in products[id(times)].items():
                        times.libraries.setdefault(name, []).append(_timed(call, calls))
            for times, numbers in steps:
                times.parts = self._parts(numbers, calls)

    def _compute(self, numbers: PassNumbers) -> None:
        graphs = self.model.graphs
        if graphs is None or graphs.run(numbers) is None:
            launched(self.model, numbers)

    def _parts(self, numbers: PassNumbers, calls: int) -> dict[str, float]:
        """Return the seconds of each part of a step; none where no program computes it."""
        programs: Any = self.model.graphs
        timed = None if programs is None else programs.time_kernels(with_adapters=False)
        if timed is None:
            return {}
        names, seconds = timed
        started = time.perf_counter()
        for _ in range(calls):
            self._compute(numbers)
        whole = (time.perf_counter() - started) / calls
        parts = dict.fromkeys(PARTS, 0.0)
        linears = [index for index, name in enumerate(names) if name.endswith("_linear")]
        for index, name in enumerate(names):
            part = LINEARS if index in linears else _PARTS.get(name, SUMS)
            parts[HEAD if index == linears[-1] else part] += float(seconds[index]) / calls
        parts[REST] = whole - sum(parts.values())
        return parts

    def _kv_seconds(self, num_tokens: int) -> float:
        per_token = self.model.block_bytes(self._block_size) / self._block_size
        return num_tokens * per_token * self._read_s


def _library(name: str, model: Any) -> Library | None:
    try:
        return Library(name, model)
    except StartupError:
        return None


def _timed(call: Callable[[], None], calls: int) -> float:
    call()
    seconds = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
