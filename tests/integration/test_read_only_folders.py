"""Folders that cannot be written: one sentence that names them, and an exit code of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lorax_contract.exit_codes import ExitCode
from lorax_shard.store.store import AdapterStore

_MOUNT = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'
_NO_BYTE_FREE = (
    'mount -t tmpfs -o size=4k none "$0" && echo x > "$0/x"; mount -o remount,ro "$0" && exec "$@"'
)
_OPEN_STORE = """
import sys
from lorax_contract.config import ShardConfig
from lorax_contract.errors import StartupError
from lorax_shard.adapters.setup import make_store
try:
    make_store(ShardConfig(model_dir="m", model_id="m", shard_uris=["unix:///0"],
                           adapter_store_dir=sys.argv[1]))
except StartupError as error:
    print(error)
    sys.exit(int(error.exit_code))
"""
_REQUIRE_SPACE = """
import sys
from pathlib import Path
from lorax_contract.errors import StartupError
from lorax_shard.prepare.files import disk_errors, require_space
folder = Path(sys.argv[1])
try:
    with disk_errors(folder):
        require_space(folder, 1 << 30, "a model")
except StartupError as error:
    print(error)
    sys.exit(int(error.exit_code))
"""


def run_over(mount: str, folder: Path, program: str, argument: Path) -> tuple[int, str]:
    """Run a program where ``folder`` is a file system that cannot be written."""
    words = ["unshare", "--mount", "--map-root-user", "sh", "-c", mount, str(folder)]
    try:
        subprocess.run([*words, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"nothing can be mounted here: {error}")
    done = subprocess.run(
        [*words, sys.executable, "-c", program, str(argument)], capture_output=True, text=True
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout


@pytest.mark.parametrize("is_warm", [True, False])
def test_a_store_that_cannot_be_written_is_said_in_one_sentence(
    tmp_path: Path, is_warm: bool
) -> None:
    store = tmp_path / "store"
    if is_warm:
        AdapterStore(store, max_bytes=1 << 20).open()
    code, text = run_over(_MOUNT, tmp_path, _OPEN_STORE, store)
    assert code == ExitCode.FOLDER_UNUSABLE
    assert f"the adapter store in {store} cannot be written: read-only file system" in text
    assert "--adapter-store-dir" in text
    assert len(text.splitlines()) == 1


def test_a_cache_without_a_free_byte_that_cannot_be_written_is_not_called_full(
    tmp_path: Path,
) -> None:
    code, text = run_over(_NO_BYTE_FREE, tmp_path, _REQUIRE_SPACE, tmp_path)
    assert code == ExitCode.FOLDER_UNUSABLE
    assert f"{tmp_path} cannot be used: read-only file system" in text
    assert "full" not in text


def test_a_store_below_a_file_is_said_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    command = [sys.executable, "-c", _OPEN_STORE, str(tmp_path / "file" / "store")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == ExitCode.FOLDER_UNUSABLE
    assert "cannot be written: not a directory" in done.stdout
