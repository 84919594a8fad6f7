"""The model cache's files: whole safetensors, atomic folders, locks, full disks."""

from __future__ import annotations

import errno
import json
import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_shard.prepare.files import (
    MARKER,
    ProgressEvent,
    check_safetensors,
    disk_errors,
    file_digest,
    is_complete,
    publish_folder,
    remembered_digest,
    require_space,
)


def _never_waits() -> None:
    raise AssertionError("nobody else holds the lock")


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.randn(3, 5), "b": torch.randn(7)}, path, metadata={"format": "pt"})
    return path


def test_a_whole_file_passes(weights: Path, tmp_path: Path) -> None:
    check_safetensors(weights)
    empty = tmp_path / "empty.safetensors"
    save_file({}, empty)
    check_safetensors(empty)


@pytest.mark.parametrize("keep", [0, 4, 8, 40, -1])
def test_a_file_cut_short_is_found(weights: Path, keep: int) -> None:
    data = weights.read_bytes()
    weights.write_bytes(data[:keep])
    with pytest.raises(StartupError, match="cut short or damaged") as error:
        check_safetensors(weights)
    assert error.value.exit_code is ExitCode.MODEL_CORRUPT
    assert str(weights) in str(error.value)


@pytest.mark.parametrize(
    "data",
    [
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n",
        (9).to_bytes(8, "little") + b"not json!",
        (2).to_bytes(8, "little") + b"[]",
        (13).to_bytes(8, "little") + b'{"a": {"x":1}}'[:13],
        (12).to_bytes(8, "little") + b'{"a":[1, 2]}',
    ],
)
def test_other_content_is_found(weights: Path, data: bytes) -> None:
    weights.write_bytes(data)
    with pytest.raises(StartupError) as error:
        check_safetensors(weights)
    assert error.value.exit_code is ExitCode.MODEL_CORRUPT


def test_longer_than_its_header_is_found(weights: Path) -> None:
    weights.write_bytes(weights.read_bytes() + b"\0")
    with pytest.raises(StartupError, match="where its header names"):
        check_safetensors(weights)


def test_a_folder_is_built_once_and_reused(tmp_path: Path) -> None:
    target, built = tmp_path / "models" / "one", []

    def build(folder: Path) -> None:
        built.append(folder)
        assert not target.exists()
        (folder / "config.json").write_text("{}")

    for _ in range(2):
        assert publish_folder(target, build, {"source": "x"}, _never_waits) == target
    assert len(built) == 1
    marker = json.loads((target / MARKER).read_text())
    assert marker["source"] == "x"
    assert marker["files"]["config.json"]["sha256"] == file_digest(target / "config.json")
    assert [path.name for path in target.parent.iterdir() if path.is_dir()] == ["one"]


@pytest.mark.parametrize("harm", ["content", "missing", "marker", "size"])
def test_a_damaged_folder_is_built_again(tmp_path: Path, harm: str) -> None:
    target = tmp_path / "one"

    def build(folder: Path) -> None:
        (folder / "tokenizer.json").write_text("right")

    publish_folder(target, build, {}, _never_waits)
    assert is_complete(target)
    file = target / "tokenizer.json"
    if harm == "missing":
        file.unlink()
    elif harm == "marker":
        (target / MARKER).write_text("{")
    else:
        file.write_text("wrong" if harm == "content" else "right and more")
    assert not is_complete(target)
    publish_folder(target, build, {}, _never_waits)
    assert file.read_text() == "right"


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "one"

    def build(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        publish_folder(target, build, {}, _never_waits)
    assert not any(path.is_dir() for path in tmp_path.iterdir())


def test_leftovers_of_a_killed_build_are_removed(tmp_path: Path) -> None:
    leftover = tmp_path / ".one.tmp-12345"
    leftover.mkdir()
    (leftover / "half").write_text("x")
    publish_folder(tmp_path / "one", lambda folder: None, {}, _never_waits)
    assert not leftover.exists()


def test_two_builders_build_once(tmp_path: Path) -> None:
    target, built, waited = tmp_path / "one", [], threading.Event()
    inside, finish = threading.Event(), threading.Event()

    def build(folder: Path) -> None:
        built.append(folder)
        inside.set()
        assert finish.wait(10)

    def on_wait() -> None:
        waited.set()

    threads = [
        threading.Thread(target=publish_folder, args=(target, build, {}, on_wait)) for _ in range(2)
    ]
    threads[0].start()
    assert inside.wait(10)
    threads[1].start()
    assert waited.wait(10)
    finish.set()
    for thread in threads:
        thread.join(10)
    assert len(built) == 1
    assert is_complete(target)


def test_a_digest_is_remembered_until_the_file_changes(tmp_path: Path) -> None:
    file, cache, events = tmp_path / "a.gguf", tmp_path / "cache", list[ProgressEvent]()
    file.write_bytes(b"one")
    first = remembered_digest(file, cache, events.append)
    assert events[-1].done == events[-1].total == 3
    events.clear()
    assert remembered_digest(file, cache, events.append) == first == file_digest(file)
    assert not events
    file.write_bytes(b"two!")
    assert remembered_digest(file, cache, events.append) == file_digest(file) != first


def test_too_little_space_is_said_before_writing(tmp_path: Path) -> None:
    require_space(tmp_path, 1, "a byte")
    with pytest.raises(StartupError, match="LORAX_CACHE") as error:
        require_space(tmp_path, 1 << 62, "a galaxy")
    assert error.value.exit_code is ExitCode.DISK_FULL


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        RuntimeError("Error while serializing: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_named_however_it_is_reported(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(StartupError) as caught, disk_errors(tmp_path):
        raise ValueError("could not save") from error
    assert caught.value.exit_code is ExitCode.DISK_FULL
    assert str(tmp_path) in str(caught.value)


def test_other_errors_pass_unchanged(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), disk_errors(tmp_path):
        raise ZeroDivisionError
    with pytest.raises(StartupError, match="permission") as caught, disk_errors(tmp_path):
        raise PermissionError(errno.EACCES, "no", "/somewhere")
    assert "/somewhere" in str(caught.value)
