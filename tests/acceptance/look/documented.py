"""All commands of README and docs, pasted page by page into folders of a fresh clone, with servers as they say.

A page's own server runs from where the page starts it to the next start, or to its end; pages that start none use
the README's. ``LOOK_PAGES=docs/keys.md,README.md`` reads these pages alone, and ``LOOK_CLONE=folder`` keeps the
clone, so that its environment need not be made again.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.acceptance.harness import Result
from tests.acceptance.look.reader import (
    ROOT,
    USUAL,
    Fault,
    Reader,
    Started,
    fresh_folder,
    write_stand_ins,
)
from tests.acceptance.serve import clean_environment
from tests.helpers.default_model import default_model_dir
from tests.helpers.documented_blocks import Block, blocks, pages
from tests.helpers.hub_stub import StubHub, running_hub

from lorax_contract.cache import default_cache_dir

# Small enough to run beside others.
_SIZES = {"NUM_BLOCKS": "800", "ADAPTER_REGISTRY": "none", "OMP_NUM_THREADS": "2"}
_EXTRAS = ".[bench]"


@dataclass
class Library:
    """Where pages are read, and what became of their blocks."""

    folder: Path
    clone: Path
    environ: dict[str, str]
    _usual: Started | None = None
    lines: list[str] = field(default_factory=list)
    num_run: int = 0
    num_failed: int = 0

    def usual(self) -> Started:
        """Return the server of pages that start none; it is started when it is first wanted."""
        if self._usual is None:
            self._usual = Started(USUAL, self.clone, self.environ)
        return self._usual

    def close(self) -> None:
        """End that server."""
        if self._usual is not None:
            self._usual.stop()

    def read(self, page: Path) -> None:
        """Paste what a page shows."""
        found = blocks(page)
        for block in found:
            if block.reason is not None:
                self._tell(block, f"not run: {block.reason}", 0.0)
        if not (runnable := [block for block in found if block.reason is None]):
            return
        name = "-".join(page.relative_to(ROOT).with_suffix("").parts)
        reader = Reader(fresh_folder(self.clone, self.folder / name), self.environ, self.usual)
        for block in runnable:
            self._try(reader, block)
        with self._judged(runnable[-1], "its server ends"):
            reader.leave()

    def _try(self, reader: Reader, block: Block) -> None:
        begun = time.perf_counter()
        with self._judged(block, "failed"):
            reader.read(block)
            self.num_run += 1
            self._tell(block, "ok", time.perf_counter() - begun)

    @contextlib.contextmanager
    def _judged(self, block: Block, what: str) -> Iterator[None]:
        try:
            yield
        except (Fault, RuntimeError, OSError, subprocess.TimeoutExpired) as error:
            self.num_failed += 1
            self._tell(block, f"FAILED ({what}): {str(error)[-900:]}", 0.0)

    def _tell(self, block: Block, end: str, seconds: float) -> None:
        first = next(line for line in block.code.splitlines() if line.strip())
        self.lines.append(f"{block.place} {end}")
        print(f"    {block.place}: {first.strip()[:60]} | {end} | {seconds:.1f} s", flush=True)


class _Everything(dict[str, dict[str, bytes]]):
    """Repositories of a hub that has each one that is asked for: models by their name, else adapters."""

    def __init__(self) -> None:
        super().__init__()
        self._adapter = _files(ROOT / "examples/adapters/sentiment")

    def __contains__(self, name: object) -> bool:
        return True

    def __missing__(self, name: str) -> dict[str, bytes]:
        return _files(default_model_dir()) if "model" in name else self._adapter


def _files(folder: Path) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in folder.iterdir() if each.is_file()}


@contextlib.contextmanager
def _library() -> Iterator[Library]:
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        hub = stack.enter_context(running_hub(StubHub(repositories=_Everything())))
        write_stand_ins(folder / "stand-ins")
        clone, environ = _clone(folder)
        path = f"{folder / 'stand-ins'}:{clone / '.venv/bin'}:{environ['PATH']}"
        environ |= _SIZES | {"HF_ENDPOINT": hub.url, "PATH": path}
        library = Library(folder, clone, environ)
        stack.callback(library.close)
        yield library


def _clone(folder: Path) -> tuple[Path, dict[str, str]]:
    """Clone this checkout's state of now and make its environment, as the first ``make serve`` does."""
    clone = Path(os.environ.get("LOOK_CLONE", folder / "clone"))
    if not clone.exists():
        subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    home = folder / "home"
    home.mkdir()
    # What a first start prepares is another test's; adapters of the hub's stand-in are nobody else's.
    stores = {"LORAX_CACHE": str(default_cache_dir()), "ADAPTER_STORE_DIR": str(folder / "store")}
    environ = clean_environment(home) | stores
    begun = time.perf_counter()
    subprocess.run(
        ["make", ".venv/.lorax-base"], cwd=clone, env=environ, check=True, capture_output=True
    )
    pip = [".venv/bin/python", "-m", "pip", "install", "-q", "-e", _EXTRAS]
    subprocess.run(pip, cwd=clone, env=environ, check=True, capture_output=True)
    print(f"    the clone's environment took {time.perf_counter() - begun:.0f} s", flush=True)
    return clone, environ


def _read(wanted: list[Path]) -> Result:
    with _library() as library:
        for page in wanted:
            library.read(page)
    marked = sum(" not run: " in line for line in library.lines)
    figure = (
        f"{library.num_run} blocks of {len(wanted)} pages ran, {library.num_failed} failed; {marked} are marked "
        "as not run, each with a reason"
    )
    return Result(library.num_run > 0 and not library.num_failed, figure)


def point_documented() -> Result:
    """Read every page, and do what it says."""
    named = os.environ.get("LOOK_PAGES")
    return _read([ROOT / each for each in named.split(",")] if named else pages())


def point_readme() -> Result:
    """Read the README alone."""
    return _read([ROOT / "README.md"])
