"""What a decode step of an 8B-shaped model consists of: its largest kernels."""

from __future__ import annotations

from bench.gpu_check.measure import launches
from bench.gpu_check.models import BLOCK_SIZE, build, device_of, load_adapters
from bench.gpu_check.report import Report
from bench.gpu_check.steps import ModelStep
from bench.gpu_check.tables import FULL, RANKS, SMALL

_LARGEST = 15


def run(report: Report, *, small: bool) -> None:
    """Profile a step without adapters and one with many."""
    sizes, device = SMALL if small else FULL, device_of(small)
    rows, num_adapters, _ = sizes.uniform
    model = build(sizes.shape, sizes.dtype, device, lora="triton" if small else "auto")
    load_adapters(model, [RANKS[number % len(RANKS)] for number in range(num_adapters)])
    model.allocate_cache(rows * -(-sizes.context // BLOCK_SIZE), BLOCK_SIZE)
    for count in (0, num_adapters):
        step = ModelStep(model, rows, 1, sizes.context, range(count))
        found = launches(step.eager, device)
        total = sum(took for _, took in found.kernels.values())
        report.table(
            f"{rows} rows, {count} adapters: {found.num} launches, {total * 1e3:.3g} ms in kernels",
            ("kernel", "launches", "µs each", "ms together", "% of the step"),
        )
        largest = sorted(found.kernels.items(), key=lambda each: -each[1][1])[:_LARGEST]
        for name, (num, took) in largest:
            report.row(name[:90], num, took / num * 1e6, took * 1e3, 100 * took / total)
