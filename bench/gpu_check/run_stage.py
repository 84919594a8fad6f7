"""Run one stage in this process: ``python -m bench.gpu_check.run_stage MODULE FILE [--small] [--ranks N]``."""

from __future__ import annotations

import importlib
import sys
import traceback
from pathlib import Path

from bench.gpu_check.report import FAILED, OK, Report
from tests.helpers.triton_interpreter import mend_interpreter


def main() -> int:
    """Run the stage; its report says how it ended."""
    module, path, *flags = sys.argv[1:]
    report = Report(Path(path))
    several = {"ranks": int(flags[flags.index("--ranks") + 1])} if "--ranks" in flags else {}
    if "--small" in flags:
        mend_interpreter()
    try:
        importlib.import_module(module).run(report, small="--small" in flags, **several)
    except Exception as error:  # noqa: BLE001 - whatever it is, the report says it
        traceback.print_exc()
        report.end(FAILED, f"{type(error).__name__}: {error}")
        return 1
    report.end(OK)
    return 0


if __name__ == "__main__":
    sys.exit(main())
