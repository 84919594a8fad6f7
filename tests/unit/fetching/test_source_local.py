"""Local folders: below the roots, no way out, and a copy that is of one moment."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.helpers.adapter_folders import CONFIG, WANTED, WEIGHTS, adapter_files, write_adapter
from tests.unit.fetching.conftest import make_context

from lorax_contract.adapters import AdapterRef, AdapterUnavailableError, Reason
from lorax_shard.fetching.sources.interface import FetchContext, Resolved, SourceSettings
from lorax_shard.fetching.sources.local import LocalSource


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


def source(*roots: Path) -> LocalSource:
    return LocalSource(SourceSettings(local_roots=tuple(map(str, roots))))


def ref(id: str) -> AdapterRef:
    return AdapterRef.of("local", id)


def fetch(root: Path, id: str, into: Path, context: FetchContext) -> Resolved:
    into.mkdir(exist_ok=True)
    resolved = source(root).resolve(ref(id), None, context)
    source(root).fetch(ref(id), resolved, into, context)
    return resolved


@pytest.mark.parametrize("absolute", [False, True])
def test_a_folder_is_copied_and_hashed(
    root: Path, tmp_path: Path, context: FetchContext, absolute: bool
) -> None:
    folder = write_adapter(root / "team" / "poet")
    fetch(root, str(folder) if absolute else "team/poet", tmp_path / "into", context)
    assert {path.name for path in (tmp_path / "into").iterdir()} == WANTED
    for name in WANTED:
        assert (tmp_path / "into" / name).read_bytes() == adapter_files()[name]


def test_a_root_may_be_an_adapter_itself(root: Path, tmp_path: Path, context: FetchContext) -> None:
    poet = write_adapter(root / "poet")
    fetch(poet, str(poet), tmp_path / "into", context)
    assert {path.name for path in (tmp_path / "into").iterdir()} == WANTED
    with pytest.raises(AdapterUnavailableError, match="leads outside"):
        source(poet).resolve(ref(str(write_adapter(root / "poetess"))), None, context)


@pytest.mark.parametrize(
    "id",
    ["../outside", "team/../../outside", "team/../poet", "..", ".", "/etc", "/", "~/x", "//etc",
     "{outside}", "{root}/../outside", "{root}", "{root}x", "team/./../../outside",
     "team//..//..//outside", "%2e%2e/outside", "..%2foutside", "..\\outside", "/proc/self/cwd",
     "/proc/self/root{outside}", "file://{outside}", "\uff0e\uff0e/outside", "loop", "loop/poet",
     "$HOME", "{root}/./team/../../outside"],
)  # fmt: skip
def test_nothing_outside_the_roots_is_reached(
    root: Path, tmp_path: Path, context: FetchContext, id: str
) -> None:
    outside = write_adapter(tmp_path / "outside")
    write_adapter(tmp_path / "rootx")
    write_adapter(root / "poet")
    (root / "team").mkdir()
    (root / "loop").symlink_to("loop")
    named = id.format(outside=outside, root=root)
    with pytest.raises(AdapterUnavailableError) as caught:
        source(root).resolve(ref(named), None, context)
    assert caught.value.reason in (Reason.REFUSED, Reason.NOT_FOUND)


def test_each_spelling_of_a_folder_is_answered_with_one(
    tmp_path: Path, context: FetchContext
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first / "poet", first / "deep" / "poet", second / "poet", second / "rhymer"):
        write_adapter(folder)
    link = tmp_path / "link"
    link.symlink_to(first)
    (first / "latest").symlink_to("poet")
    source = LocalSource(SourceSettings(local_roots=(str(link), str(second))))

    def spelled(id: str) -> str | None:
        return source.resolve(AdapterRef.of("local", id), None, context).id

    for spelling in ("poet", "./poet/", f"{first}/poet", f"{link}/poet/", f"{first}/./poet"):
        assert spelled(spelling) == "poet"
    assert spelled(f"{link}//deep/poet") == spelled("deep/./poet") == "deep/poet"
    # A name of the first root cannot stand for a folder of the second.
    assert spelled(f"{second}/poet") == f"{second}/poet"
    assert spelled(f"{second}/rhymer") == spelled("rhymer") == "rhymer"
    # A link may lead elsewhere tomorrow: it is a name of its own.
    assert spelled("latest") == spelled(f"{link}/latest") == "latest"


def test_whether_something_exists_outside_is_not_told(
    root: Path, tmp_path: Path, context: FetchContext
) -> None:
    texts = []
    for name in ("there", "not-there"):
        if name == "there":
            write_adapter(tmp_path / name)
        with pytest.raises(AdapterUnavailableError) as caught:
            source(root).resolve(ref(str(tmp_path / name)), None, context)
        texts.append(caught.value.text.replace(name, ""))
    assert texts[0] == texts[1]


def plant_folder_link(root: Path, outside: Path) -> None:
    (root / "poet").symlink_to(outside)


def plant_parent_link(root: Path, outside: Path) -> None:
    (root / "team").symlink_to(outside.parent)
    (outside.parent / "poet").symlink_to(outside)


def plant_file_link(root: Path, outside: Path) -> None:
    write_adapter(root / "poet")
    (root / "poet" / WEIGHTS).unlink()
    (root / "poet" / WEIGHTS).symlink_to(outside / WEIGHTS)


def plant_link_chain(root: Path, outside: Path) -> None:
    (root / "first").symlink_to(root / "second")
    (root / "second").symlink_to(outside)
    (root / "poet").symlink_to("first")


@pytest.mark.parametrize(
    "plant", [plant_folder_link, plant_parent_link, plant_file_link, plant_link_chain]
)
def test_links_that_lead_outside_are_refused(
    root: Path, tmp_path: Path, context: FetchContext, plant: Callable[[Path, Path], None]
) -> None:
    plant(root, write_adapter(tmp_path / "elsewhere" / "outside"))
    named = "team/poet" if (root / "team").exists() else "poet"
    with pytest.raises(AdapterUnavailableError, match="outside") as caught:
        source(root).resolve(ref(named), None, context)
    assert caught.value.reason is Reason.REFUSED


def test_links_within_a_root_are_followed(
    root: Path, tmp_path: Path, context: FetchContext
) -> None:
    # As in the hub's own cache: a snapshot's files are links to blobs beside it.
    folder = write_adapter(root / "snapshots" / "abc")
    (root / "blobs").mkdir()
    (folder / WEIGHTS).rename(root / "blobs" / "1")
    (folder / WEIGHTS).symlink_to("../../blobs/1")
    (root / "alias").symlink_to("snapshots/abc")
    fetch(root, "alias", tmp_path / "into", context)
    assert (tmp_path / "into" / WEIGHTS).read_bytes() == adapter_files()[WEIGHTS]
    assert not (tmp_path / "into" / WEIGHTS).is_symlink()


def test_a_link_swapped_in_after_the_look_leads_nowhere(
    root: Path, tmp_path: Path, context: FetchContext
) -> None:
    folder = write_adapter(root / "poet")
    outside = write_adapter(tmp_path / "outside", seed=9)
    resolved = source(root).resolve(ref("poet"), None, context)
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(outside / WEIGHTS)
    (tmp_path / "into").mkdir()
    with pytest.raises(AdapterUnavailableError):
        source(root).fetch(ref("poet"), resolved, tmp_path / "into", context)
    assert not (tmp_path / "into" / WEIGHTS).exists()


def listen_at(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        os.chdir(path.parent)
        listener.bind(path.name)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("put", [os.mkfifo, Path.mkdir, listen_at])
def test_what_is_no_file_in_place_of_one_is_refused_and_does_not_hang(
    root: Path,
    context: FetchContext,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    put: Callable[[Path], None],
) -> None:
    monkeypatch.chdir(root)
    folder = write_adapter(root / "poet")
    (folder / name).unlink()
    put(folder / name)
    with pytest.raises(AdapterUnavailableError, match=f"{name} is not a regular file") as caught:
        source(root).resolve(ref("poet"), None, context)
    assert caught.value.reason is Reason.REFUSED


def test_a_file_in_place_of_a_folder_is_said(root: Path, context: FetchContext) -> None:
    write_adapter(root / "poet")
    with pytest.raises(AdapterUnavailableError, match="is a file; name the folder") as caught:
        source(root).resolve(ref(f"poet/{WEIGHTS}"), None, context)
    assert caught.value.reason is Reason.NOT_FOUND


def test_a_change_while_copying_is_noticed(
    root: Path, tmp_path: Path, context: FetchContext
) -> None:
    folder = write_adapter(root / "poet", num_floats=1 << 19)
    (tmp_path / "into").mkdir()
    resolved = source(root).resolve(ref("poet"), None, context)

    def edit(step: str) -> None:
        if step == f"bytes of {WEIGHTS}":
            (folder / CONFIG).write_bytes(b"{}")

    context.on_step = edit
    with pytest.raises(AdapterUnavailableError, match="changed") as caught:
        source(root).fetch(ref("poet"), resolved, tmp_path / "into", context)
    assert caught.value.reason is Reason.TRANSIENT


def test_the_version_follows_the_files(root: Path, context: FetchContext) -> None:
    folder = write_adapter(root / "poet")
    before = source(root).resolve(ref("poet"), None, context)
    assert source(root).resolve(ref("poet"), None, context).version == before.version
    (folder / CONFIG).write_bytes((folder / CONFIG).read_bytes())
    assert source(root).resolve(ref("poet"), None, context).version != before.version


def test_a_version_is_trusted_only_when_its_files_are_not_fresh(
    root: Path, context: FetchContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two writes within one tick of the file system's clock look the same.
    write_adapter(root / "poet")
    assert not source(root).resolve(ref("poet"), None, context).lasting
    later = time.time_ns() + 10_000_000_000
    monkeypatch.setattr("lorax_shard.fetching.sources.local.time.time_ns", lambda: later)
    assert source(root).resolve(ref("poet"), None, context).lasting


@pytest.mark.parametrize("id", ["nothing", "poet/adapter_config.json", "file"])
def test_what_is_no_folder_is_not_found(root: Path, context: FetchContext, id: str) -> None:
    write_adapter(root / "poet")
    (root / "file").write_text("x")
    with pytest.raises(AdapterUnavailableError) as caught:
        source(root).resolve(ref(id), None, context)
    assert caught.value.reason is Reason.NOT_FOUND


def test_without_roots_local_is_off(tmp_path: Path, context: FetchContext) -> None:
    folder = write_adapter(tmp_path / "poet")
    with pytest.raises(AdapterUnavailableError, match="takes no local adapters"):
        source().resolve(ref(str(folder)), None, context)


def test_a_file_over_its_limit_is_not_copied(root: Path, tmp_path: Path) -> None:
    write_adapter(root / "poet", num_floats=1000)
    (tmp_path / "into").mkdir()
    context = make_context(max_file_bytes=2000)
    resolved = source(root).resolve(ref("poet"), None, context)
    with pytest.raises(AdapterUnavailableError) as caught:
        source(root).fetch(ref("poet"), resolved, tmp_path / "into", context)
    assert caught.value.reason is Reason.TOO_LARGE
    assert not (tmp_path / "into" / WEIGHTS).exists()
