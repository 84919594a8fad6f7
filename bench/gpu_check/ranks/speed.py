"""What N ranks make of a step: decodes and prompts beside one rank, with adapters and without."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bench.gpu_check.loads import RequestLoad, ServingSizes, write_model
from bench.gpu_check.models import BLOCK_SIZE, TINY, LlamaShape, device_of
from bench.gpu_check.ranks import group
from bench.gpu_check.ranks.group import RankSeat
from bench.gpu_check.report import Report
from bench.gpu_check.steps import ModelStep

ADAPTER_RANK = 16
_COLUMNS = ("step", "adapters", "one rank, ms", "as a graph, ms", "all ranks, ms", "speed-up")


class StepCase(NamedTuple):
    """A step: rows with so many new tokens at the end of their context."""

    rows: int
    tokens: int
    context: int
    adapters: int

    @property
    def label(self) -> str:
        """What it is, for a table."""
        if self.tokens == 1:
            return f"decode, {self.rows} rows at {self.context}"
        return f"prompts, {self.rows} x {self.tokens}"


class SpeedSizes(NamedTuple):
    """What is computed."""

    shape: LlamaShape
    dtype: torch.dtype
    cases: tuple[StepCase, ...]
    repeats: int


# An 8B model's layers, eight of them: what is compared is a layer's time.
FULL = SpeedSizes(
    LlamaShape(4096, 14336, 8, 32, 8, 128256), torch.bfloat16,
    tuple(
        StepCase(rows, tokens, context, adapters)
        for rows, tokens, context in ((1, 1, 512), (8, 1, 512), (64, 1, 512), (1, 2048, 2048))
        for adapters in (0, min(rows, 8))
    ), 20,
)  # fmt: skip
SMALL = SpeedSizes(
    TINY, torch.float32, (StepCase(2, 1, 20, 0), StepCase(2, 1, 20, 2), StepCase(1, 12, 12, 1)), 3
)


def run(report: Report, *, small: bool, ranks: int) -> None:
    """Time one rank, then all of them."""
    sizes = SMALL if small else FULL
    if small:
        report.note("tiny shapes on CPUs: it shows that the stage runs, no speed")
    report.note(
        "decode steps of one rank are graphs when it serves, those of several are launched kernel "
        "by kernel; the speed-up is over the quicker of one rank's"
    )
    report.table(f"A step of {ranks} ranks beside one", _COLUMNS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        unused = RequestLoad(1, 1, 1)
        serving = ServingSizes(sizes.shape, str(sizes.dtype)[6:], 0, unused, unused)
        write_model(folder / "model", serving, device_of(small))
        alone = group.run_group(__name__, 1, folder, small=small)
        found: dict[int, list[Any]] = {1: group.read_json(alone[0])}
        found[ranks] = group.read_json(group.run_group(__name__, ranks, folder, small=small)[0])
    for case, one, all_of_them in zip(sizes.cases, found[1], found[ranks], strict=True):
        add(report, case, one, all_of_them)


def add(
    report: Report, case: StepCase, one: dict[str, float | None], several: dict[str, float | None]
) -> None:
    """Add a line."""
    best = min(value for value in one.values() if value is not None)
    took = several["eager"]
    assert took is not None
    graph = one["graph"]
    report.row(
        case.label, case.adapters, 1e3 * (one["eager"] or 0.0),
        None if graph is None else 1e3 * graph, 1e3 * took, best / took,
    )  # fmt: skip


def compute(seat: RankSeat) -> None:
    """Time all cases by this rank; the ranks compute each as often, or they would wait for ever."""
    sizes = SMALL if seat.small else FULL
    part = group.load(seat, seat.folder / "model", sizes.dtype)
    model = part.model
    most = max(case.adapters for case in sizes.cases)
    group.load_adapters(model, [ADAPTER_RANK] * most)
    found = []
    for case in sizes.cases:
        model.allocate_cache(case.rows * -(-case.context // BLOCK_SIZE), BLOCK_SIZE)
        step = ModelStep(model, case.rows, case.tokens, case.context, list(range(case.adapters)))
        times: dict[str, float | None] = {"eager": timed(step.eager, seat, sizes.repeats)}
        replay = step.graph() if seat.world_size == 1 and case.tokens == 1 else None
        times["graph"] = None if replay is None else timed(replay, seat, sizes.repeats)
        found.append(times)
        model.free_cache()
    group.write_json(seat.folder / f"rank-{seat.rank}", found)
    part.close()


def timed(call: Callable[[], object], seat: RankSeat, repeats: int) -> float:
    """Return the seconds of a call, in the mean of so many behind three that warm up."""

    def wait() -> None:
        if not seat.small:
            torch.cuda.synchronize()

    for _ in range(3):
        call()
    wait()
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    wait()
    return (time.perf_counter() - started) / repeats
