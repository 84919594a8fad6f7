"""Host copies: read once, from what was verified, within a budget of bytes."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from tests.helpers.lane_world import LaneWorld, failure
from tests.helpers.log_events import events_in

from lorax_contract.adapters import Reason
from lorax_contract.step import AdapterHandle

ONE, TWO, THREE = AdapterHandle(1), AdapterHandle(2), AdapterHandle(3)


@pytest.fixture
def world(tmp_path: Path) -> LaneWorld:
    return LaneWorld(tmp_path)


def test_host_copies_stay_within_their_budget(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each that gives way is an event."""
    caplog.set_level("INFO")
    world = LaneWorld(tmp_path)
    size = world.host.get(world.add(9.0)).nbytes
    world = LaneWorld(tmp_path, host_bytes=2 * size)
    parts = [world.add(float(number)) for number in range(1, 4)]
    for handle, part in enumerate(parts, start=1):
        world.prepare(AdapterHandle(handle), part)
    assert set(world.host.sizes()) == {part.content_digest for part in parts[1:]}
    (told,) = events_in(caplog, "adapter_evicted")
    assert (told["level"], told["bytes"]) == ("host", size)
    assert told["digest"] == parts[0].content_digest
    # Those on the device are none of it.
    assert set(world.lane.device_tier()) == {ONE, TWO, THREE}


def test_a_copy_that_is_dear_or_often_used_outlives_others(tmp_path: Path) -> None:
    world = LaneWorld(tmp_path)
    size = world.host.get(world.add(9.0)).nbytes
    world = LaneWorld(tmp_path, host_bytes=2 * size)
    dear, often, cheap, cheaper = (world.add(float(number)) for number in range(1, 5))
    world.clock.step_s = 100.0
    world.host.get(dear)
    world.clock.step_s = 1.0
    for part in (cheap, cheaper):
        world.host.get(part)
        assert set(world.host.sizes()) == {dear.content_digest, part.content_digest}
    world.clock.step_s = 10.0
    for _ in range(15):
        world.host.get(often)
    world.clock.step_s = 1.0
    world.host.get(cheap)
    assert set(world.host.sizes()) == {often.content_digest, cheap.content_digest}


def test_a_copy_that_is_larger_than_the_budget_is_used_and_not_kept(tmp_path: Path) -> None:
    world = LaneWorld(tmp_path)
    size = world.host.get(world.add(9.0)).nbytes
    world = LaneWorld(tmp_path, host_bytes=size)
    small, large = world.add(1.0), world.add(2.0, rank=4)
    world.prepare(ONE, small)
    world.prepare(TWO, large)
    assert set(world.lane.device_tier()) == {ONE, TWO}
    assert world.host.sizes() == {small.content_digest: size}


def test_callers_at_the_same_time_read_once(world: LaneWorld) -> None:
    part = world.add()
    with ThreadPoolExecutor(4) as threads:
        copies = list(threads.map(world.host.get, [part] * 16))
    assert len({id(copy) for copy in copies}) == 1
    assert copies[0].num_uses == 16


def test_files_that_left_the_store_are_fetched_again_by_whoever_can(world: LaneWorld) -> None:
    part = world.add()
    world.store.remove(part.store_digest)
    assert failure(lambda: world.prepare(ONE, part)).reason is Reason.EVICTED
    assert world.add() == part
    world.prepare(ONE, part)
    assert world.lane.ready(ONE) is not None


def test_a_host_copy_needs_no_files(world: LaneWorld) -> None:
    part = world.add()
    copy = world.host.get(part)
    values = [delta.a.clone() for delta in copy.adapter.modules.values()]
    world.store.remove(part.store_digest)
    world.prepare(ONE, part)
    for delta, value in zip(copy.adapter.modules.values(), values, strict=True):
        assert torch.equal(delta.a, value)


def test_files_that_are_not_what_was_verified_are_found_out(world: LaneWorld) -> None:
    part, other = world.add(1.0), world.add(2.0)
    for digest in (part.store_digest, other.store_digest):
        assert (world.folder / "store/entries" / digest).is_dir()
    weights = "adapter_model.safetensors"
    entries = world.folder / "store/entries"
    shutil.copy(entries / other.store_digest / weights, entries / part.store_digest / weights)
    error = failure(lambda: world.prepare(ONE, part))
    assert error.reason is Reason.CORRUPT
    assert world.host.sizes() == {}
    assert world.lane.device_tier() == {}


def test_tokens_of_an_adapters_own_are_counted(world: LaneWorld) -> None:
    plain, own = world.host.get(world.add(1.0)), world.host.get(world.add(2.0, tokenizer=True))
    assert own.vocabulary is not None
    assert own.nbytes == plain.nbytes + own.vocabulary.nbytes
    assert sum(world.host.sizes().values()) == plain.nbytes + own.nbytes


def test_a_tokenizer_is_read_by_the_process_that_verifies_it_alone(
    world: LaneWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading one holds Python's lock, which the thread that computes steps needs too."""
    parts = [world.add(float(number), tokenizer=True) for number in range(1, 10)]

    class Unread:
        def __getattr__(self, name: str) -> None:
            raise AssertionError("a tokenizer is read beside the steps")

    monkeypatch.setattr("tokenizers.Tokenizer", Unread())
    for handle, part in enumerate(parts, start=1):
        world.prepare(AdapterHandle(handle), part)
        ready = world.lane.ready(AdapterHandle(handle))
        assert ready is not None
        assert ready.vocabulary is not None


def test_tokens_that_were_damaged_on_the_disk_are_fetched_again(world: LaneWorld) -> None:
    part = world.add(tokenizer=True)
    (path,) = world.folder.glob("store/**/vocabulary.safetensors")
    raw = bytearray(path.read_bytes())
    raw[-20] ^= 1
    path.write_bytes(raw)
    error = failure(lambda: world.host.get(part))
    assert error.reason is Reason.CORRUPT


def test_an_adapters_options_are_not_read_where_it_is_loaded(world: LaneWorld) -> None:
    """A pattern that takes for ever would hold up the model's process: nobody matches it there."""
    part = world.add()
    path = world.store.root / "entries" / part.store_digest / "adapter_config.json"
    endless = json.dumps({"peft_type": "LORA", "target_modules": "(([a-z_0-9.])*)*!"})
    size = path.stat().st_size
    path.chmod(0o600)
    # Of the same size, or the entry would count as damaged.
    path.write_text(endless.ljust(size))
    assert path.stat().st_size == size
    assert world.host.get(part).nbytes > 0
