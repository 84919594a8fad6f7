"""What the largest step takes beside its cache, measured at an earlier start of the very same thing.

On a CPU the memory of a step follows from the code, the shapes and the options, so that who has
measured it once need not compute it again. What all that is names the file: with another release,
another option or another model it is measured anew.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from lorax_contract.cache import default_cache_dir
from lorax_contract.step import WarmupSpec
from lorax_shard.engine.memory_plan import PoolSettings

logger = logging.getLogger(__name__)

_PACKAGE = Path(__file__).parent.parent
# Variables that say how libraries allocate and compute.
_VARIABLES = ("MALLOC_", "GLIBC_", "OMP_", "KMP_", "MKL_", "ONEDNN_", "LORAX_", "LD_PRELOAD")


class RememberedPeak:
    """Keeps the bytes that the largest step took, by all that they depend on.

    ``parts`` name the model, the options and the machine; the code and the environment are added.
    """

    def __init__(self, parts: Sequence[object], folder: Path | None = None) -> None:
        self._parts = [*parts, source_stamp(), _environment()]
        self._folder = folder or default_cache_dir() / "steps"

    def recall(self, spec: WarmupSpec, pool: PoolSettings) -> int | None:
        """Return the bytes, None where they are to be measured."""
        try:
            document = json.loads(self._path(spec, pool).read_text(encoding="utf-8"))
            num_bytes = document["activations"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return num_bytes if isinstance(num_bytes, int) and num_bytes > 0 else None

    def remember(self, spec: WarmupSpec, pool: PoolSettings, num_bytes: int) -> None:
        """Keep what was measured; a folder that cannot be written costs the next start its time."""
        path = self._path(spec, pool)
        scratch = path.with_suffix(f".{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            scratch.write_text(json.dumps({"activations": num_bytes}), encoding="utf-8")
            scratch.replace(path)
        except OSError as error:
            logger.warning("the largest step is measured again at the next start: %s", error)

    def _path(self, spec: WarmupSpec, pool: PoolSettings) -> Path:
        parts = [*self._parts, asdict(spec), asdict(pool)]
        text = json.dumps(parts, default=str, sort_keys=True)
        return self._folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def source_stamp() -> str:
    """Return a name for this very code: installed anew, or edited, it is another one."""
    stamps = [
        (str(path.relative_to(_PACKAGE)), path.stat().st_size, path.stat().st_mtime_ns)
        for path in _PACKAGE.rglob("*")
        if path.suffix in (".py", ".cpp", ".h")
    ]
    return hashlib.sha256(repr(sorted(stamps)).encode()).hexdigest()[:16]


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(_VARIABLES)}
