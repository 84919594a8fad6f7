"""Kernels in C++: compiled for this very CPU when first asked for, kept in the cache folder.

A kernel shares torch's OpenMP threads: a second pool of threads would fight the first
for the cores.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lorax_contract.cache import default_cache_dir
from lorax_shard.cache import cpu_identity

logger = logging.getLogger(__name__)

# No -ffast-math: linked into a library it changes how the whole process rounds.
_FLAGS = (
    "-O3", "-march=native", "-std=c++17", "-fPIC", "-fopenmp",
    "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math",
)  # fmt: skip
_COMPILE_TIMEOUT_S = 120
_INCLUDE = re.compile(r'^#include "(.+)"$', re.MULTILINE)


class NativeFunction:
    """A kernel that is told all it needs in one struct, whose fields have eight bytes each.

    A library exports it twice: ``NAME`` shares its work among threads of its own; ``NAME_team``
    is called by all threads of a team, and has ended when it returns in any of them.

    ``joined`` are kernels that compute this one and the one that is called next, by the latter's
    name; see ``model.programs.joined``.
    """

    __slots__ = (
        "_alone",
        "is_by_row",
        "is_light",
        "joined",
        "name",
        "of_all",
        "rows_address",
        "team_address",
    )

    def __init__(
        self,
        library: ctypes.CDLL,
        name: str,
        *,
        is_light: bool = False,
        is_by_row: bool = False,
        of_all: Collection[int] = (),
        for_rows: str = "",
    ) -> None:
        """``is_light``: it does little with each number that it reads.

        ``is_by_row``: what it writes for a token follows from what it reads of that token, of the
        KV cache and of the model, and it writes to neither of them. ``of_all``: the fields that
        are addresses of what it reads of other tokens, too. ``for_rows``: what computes the same
        for some rows and columns, for kernels that join this one.
        """
        alone: Any = getattr(library, name)
        alone.argtypes, alone.restype = (ctypes.c_char_p,), None
        self.name, self._alone = name, alone
        self.is_light, self.is_by_row = is_light, is_by_row
        self.of_all = frozenset(of_all)
        self.joined: dict[str, NativeFunction] = {}
        self.team_address = _address(library, f"{name}_team")
        self.rows_address = _address(library, for_rows) if for_rows else 0

    def __call__(self, fields: bytes) -> None:
        """Compute; ``fields`` are those of the struct."""
        if _noted is not None:
            _noted(self, fields)
        self._alone(fields)


def _address(library: ctypes.CDLL, name: str) -> int:
    return ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0


# Is told of each call of a kernel before it is computed.
_noted: Callable[[NativeFunction, bytes], None] | None = None


@contextmanager
def noting_calls(note: Callable[[NativeFunction, bytes], None]) -> Iterator[None]:
    """Within, ``note`` is told what this thread asks of kernels; such contexts do not nest."""
    global _noted
    own = threading.get_ident()

    def note_own(function: NativeFunction, fields: bytes) -> None:
        if threading.get_ident() == own:
            note(function, fields)

    assert _noted is None, "calls are noted already"
    _noted = note_own
    try:
        yield
    finally:
        _noted = None


def load_library(source: Path, *flags: str) -> tuple[ctypes.CDLL | None, str | None]:
    """Return the library made from a C++ file, or None and the reason in words.

    The file may include headers of the project, by paths from where it lies. ``flags`` come after
    the usual ones.
    """
    compiler = next(filter(None, map(shutil.which, _compilers())), None)
    if compiler is None:
        return None, "no C++ compiler is installed (looked for g++ and c++)"
    try:
        # Resolve every symbol now: a missing one must fail here, not in the middle of a step.
        return ctypes.CDLL(str(_built(source, compiler, (*_FLAGS, *flags))), mode=os.RTLD_NOW), None
    except subprocess.SubprocessError as error:
        return None, f"{compiler} failed: {_last_words(error)}"
    except OSError as error:
        return None, f"the compiled kernel cannot be stored or loaded: {error}"


def _compilers() -> tuple[str, ...]:
    chosen = os.environ.get("CXX")
    return (chosen,) if chosen else ("g++", "c++")


def _built(source: Path, compiler: str, flags: tuple[str, ...]) -> Path:
    """Return the compiled library, from the cache folder if it was built there for this CPU."""
    name = source.stem
    folder = default_cache_dir() / "kernels"
    library = folder / f"{name}-{_build_key(source, compiler, flags)}.so"
    if not library.is_file():
        logger.info("compiling the %s kernel for this CPU", name)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            compiled, linked = Path(scratch, f"{name}.o"), Path(scratch, f"{name}.so")
            _run([compiler, *flags, "-c", str(source), "-o", str(compiled)])
            # Without -fopenmp here: its symbols are found in the runtime that torch loaded.
            _run([compiler, "-shared", str(compiled), "-o", str(linked)])
            linked.replace(library)
    return library


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=_COMPILE_TIMEOUT_S)


def _build_key(source: Path, compiler: str, flags: tuple[str, ...]) -> str:
    """Return a name for what the library depends on: sources, flags, compiler, instruction set."""
    parts = [*_texts(source).values(), *flags, compiler, *cpu_identity()]
    version = subprocess.run(
        [compiler, "--version"], check=True, capture_output=True, text=True, timeout=10
    )
    return hashlib.sha256("\n".join([*parts, version.stdout]).encode()).hexdigest()[:16]


def _texts(source: Path) -> dict[Path, str]:
    """Return the texts of a source and of all that it includes from the project."""
    texts: dict[Path, str] = {}
    left = [source.resolve()]
    while left:
        path = left.pop()
        if path not in texts:
            texts[path] = path.read_text(encoding="utf-8")
            left += [(path.parent / name).resolve() for name in _INCLUDE.findall(texts[path])]
    return texts


def _last_words(error: subprocess.SubprocessError) -> str:
    output = getattr(error, "stderr", None)
    if isinstance(output, str) and output.strip():
        return output.strip().splitlines()[-1]
    return str(error)
