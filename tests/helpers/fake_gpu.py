"""A GPU that is not there: Triton compiles for it, and nothing runs.

Kernels are launched over CPU tensors, as the backends launch them on a GPU: each that would be
compiled there is compiled here, down to its binary, whose registers and stack the assembler
tells. Triton decides at its import whether kernels are compiled or interpreted, so programs run
in a process of their own.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Binary:
    """One compiled variant of a kernel, and what a program of it takes."""

    kernel: str
    registers: int
    # Bytes of each thread's own memory: what did not fit its registers, above all.
    stack: int
    shared: int
    # Instructions that load one or two bytes of the device's memory, and those that load 16.
    narrow_loads: int
    wide_loads: int


class Compiled(NamedTuple):
    """What Triton loads."""

    kernel: str
    code: bytes
    shared: int

    def examine(self) -> Binary:
        """Read it by the tool that comes with Triton."""
        import triton

        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.code)
            file.flush()
            command = [tool, "--dump-resource-usage", "--dump-sass", file.name]
            told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", told)
        assert found, told
        # LDG: into registers; LDGSTS: into shared memory.
        loads = re.findall(r"\b(?:LDG|LDGSTS)\.[\w.]+", told)
        narrow = sum(bool(re.search(r"\.[US](?:8|16)\b", load)) for load in loads)
        wide = sum(".128" in load for load in loads)
        stack = int(found[2]) + int(found[3])
        return Binary(self.kernel, int(found[1]), stack, self.shared, narrow, wide)


class FakeGPU:
    """What Triton asks of a driver and of a device."""

    def __init__(self, capability: int = 90) -> None:
        self.binaries: list[Compiled] = []
        self.launches: Counter[str] = Counter()
        self.utils = self
        self._capability = capability

    def install(self) -> FakeGPU:
        """Become the device that Triton compiles for."""
        from triton.runtime import driver

        driver.set_active(self)
        return self

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._capability, 32)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 << 10}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, ...]:
        self.binaries.append(Compiled(name, kernel, shared))
        return len(self.binaries), len(self.binaries), 0, 0, 1024

    def unload_module(self, module: int) -> None:
        pass

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *arguments: self.launches.update([metadata.name])


def run_on_fake_gpu(
    program: str, *arguments: Any, cache: Path, capability: int = 90, timeout_s: float = 880.0
) -> list[Binary]:
    """Return what a function of the name ``module:function`` has compiled, in its own process.

    It is given a ``FakeGPU`` and ``arguments``, which travel as JSON, and returns some of the
    former's binaries. ``cache`` holds what Triton compiles.
    """
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.helpers.fake_gpu", program, str(capability)],
        input=json.dumps(arguments),
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [Binary(**fields) for fields in json.loads(done.stdout.splitlines()[-1])]


def main() -> None:
    import importlib

    module, _, name = sys.argv[1].partition(":")
    gpu = FakeGPU(int(sys.argv[2])).install()
    compiled = getattr(importlib.import_module(module), name)(gpu, *json.load(sys.stdin))
    print(json.dumps([asdict(each.examine()) for each in compiled]))


if __name__ == "__main__":
    main()
