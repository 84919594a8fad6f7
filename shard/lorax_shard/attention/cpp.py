"""The ``cpp`` backend: decode rows by a kernel of our own, prompts as ``sdpa`` does them.

``decode.cpp`` is compiled for this very CPU when it is first asked for, and kept in
the cache folder. It shares torch's OpenMP threads: a second pool of threads would
fight the first for the cores.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lorax_shard.attention.backend import AttentionSpec
from lorax_shard.attention.metadata import StepMetadata
from lorax_shard.attention.sdpa import SdpaAttention
from lorax_shard.cache import cpu_identity, default_cache_dir

logger = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("decode.cpp")
# No -ffast-math: linked into a library it changes how the whole process rounds.
_FLAGS = (
    "-O3", "-march=native", "-std=c++17", "-fPIC", "-fopenmp",
    "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math",
)  # fmt: skip
_COMPILE_TIMEOUT_S = 120
_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_ARGUMENTS = (
    _POINTER, _INT, _INT,  # query and its strides
    _POINTER, _POINTER, _POINTER,  # keys, values, output
    _POINTER, _INT, _POINTER,  # block tables, their stride, lengths
    _INT, _INT, _INT, _INT, _INT, _INT,  # rows, heads, kv heads, key dim, value dim, block size
    _FLOAT, _INT, _FLOAT, _POINTER, ctypes.c_int,  # scaling, window, softcap, sinks, threads
)  # fmt: skip


class CppAttention(SdpaAttention):
    """Reads each KV block of a decode row once, where it lies."""

    name = "cpp"

    @classmethod
    def probe(cls, device: torch.device, dtype: torch.dtype) -> str | None:
        """Return why the kernel cannot be built or loaded here, or None."""
        if device.type != "cpu":
            return f"it computes on a CPU, not on {device.type}"
        if dtype is not torch.float32:
            return f"it computes float32, not {str(dtype).removeprefix('torch.')}"
        _, reason = _kernel()
        return reason

    def _decode(
        self,
        query: torch.Tensor,
        output: torch.Tensor,
        layer: int,
        spec: AttentionSpec,
        metadata: StepMetadata,
    ) -> None:
        kernel, reason = _kernel()
        assert kernel is not None, reason  # the registry makes no backend that cannot run
        keys, values = metadata.cache.keys[layer], metadata.cache.values[layer]
        tables, lengths = _tables_and_lengths(metadata)
        query = query if query.stride(2) == 1 else query.contiguous()
        sinks = None if spec.sinks is None else spec.sinks.float().contiguous()
        kernel(
            query.data_ptr(), query.stride(0), query.stride(1),
            keys.data_ptr(), values.data_ptr(), output.data_ptr(),
            tables.data_ptr(), tables.stride(0), lengths.data_ptr(),
            metadata.num_decode_rows, query.shape[1], keys.shape[2], keys.shape[3],
            values.shape[3], keys.shape[1], spec.scaling, spec.window or 0, spec.softcap or 0.0,
            None if sinks is None else sinks.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip


def _tables_and_lengths(metadata: StepMetadata) -> tuple[torch.Tensor, torch.Tensor]:
    if "cpp.rows" not in metadata.scratch:
        lengths = torch.tensor(metadata.context_lens[: metadata.num_decode_rows])
        metadata.scratch["cpp.rows"] = metadata.block_tables.contiguous(), lengths
    rows: tuple[torch.Tensor, torch.Tensor] = metadata.scratch["cpp.rows"]
    return rows


@functools.cache
def _kernel() -> tuple[Callable[..., None] | None, str | None]:
    """Return the kernel, or None and the reason in words."""
    compiler = next(filter(None, map(shutil.which, _compilers())), None)
    if compiler is None:
        return None, "no C++ compiler is installed (looked for g++ and c++)"
    try:
        function: Any = _load(_built(compiler))
    except subprocess.SubprocessError as error:
        return None, f"{compiler} failed: {_last_words(error)}"
    except OSError as error:
        return None, f"the compiled kernel cannot be stored or loaded: {error}"
    return function, None


def _compilers() -> tuple[str, ...]:
    chosen = os.environ.get("CXX")
    return (chosen,) if chosen else ("g++", "c++")


def _built(compiler: str) -> Path:
    """Return the compiled library, from the cache folder if it was built there for this CPU."""
    library = default_cache_dir() / "kernels" / f"decode-{_build_key(compiler)}.so"
    if not library.is_file():
        logger.info("compiling the attention kernel for this CPU")
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            compiled, linked = Path(scratch, "decode.o"), Path(scratch, "decode.so")
            _run([compiler, *_FLAGS, "-c", str(_SOURCE), "-o", str(compiled)])
            # Without -fopenmp here: its symbols are found in the runtime that torch loaded.
            _run([compiler, "-shared", str(compiled), "-o", str(linked)])
            linked.replace(library)
    return library


def _load(library: Path) -> Any:
    # Resolve every symbol now: a missing one must fail here, not in the middle of a step.
    function = ctypes.CDLL(str(library), mode=os.RTLD_NOW).lorax_decode_attention
    function.argtypes, function.restype = _ARGUMENTS, None
    return function


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=_COMPILE_TIMEOUT_S)


def _build_key(compiler: str) -> str:
    """Return a name for what the library depends on: source, flags, compiler, instruction set."""
    parts = [_SOURCE.read_text(encoding="utf-8"), *_FLAGS, compiler, *cpu_identity()]
    version = subprocess.run(
        [compiler, "--version"], check=True, capture_output=True, text=True, timeout=10
    )
    return hashlib.sha256("\n".join([*parts, version.stdout]).encode()).hexdigest()[:16]


def _last_words(error: subprocess.SubprocessError) -> str:
    output = getattr(error, "stderr", None)
    if isinstance(output, str) and output.strip():
        return output.strip().splitlines()[-1]
    return str(error)
