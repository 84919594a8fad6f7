"""Compiles Triton kernels for a GPU that need not be there.

The interpreter runs Python that the compiler refuses; this shows it. It takes a process of its
own, because Triton decides once whether kernels are compiled or interpreted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

_PROGRAM = """
import importlib, json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

asked = json.load(sys.stdin)
module = importlib.import_module(asked["module"])
for name in asked["kernels"]:
    kernel = getattr(module, name)
    names, constants = kernel.arg_names, asked["constants"]
    source = ASTSource(
        fn=kernel,
        signature={n: "constexpr" if n in constants else asked["types"].get(n, "i32") for n in names},
        constexprs={(names.index(n),): size for n, size in constants.items() if n in names},
    )
    triton.compile(source, target=GPUTarget("cuda", asked["capability"], 32))
    print(name)
"""


def compile_kernels(
    module: str,
    kernels: list[str],
    types: dict[str, str],
    constants: dict[str, int | bool],
    cache: Path,
    capability: int = 80,
) -> list[str]:
    """Return the kernels that compile, all or none after an AssertionError with the reason.

    Arguments that are neither in ``types`` nor in ``constants`` are 32-bit integers.
    """
    asked = {
        "module": module, "kernels": kernels, "types": types, "constants": constants,
        "capability": capability,
    }  # fmt: skip
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _PROGRAM],
        input=json.dumps(asked),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.split()
