"""Host copies and prepared adapters of one rank: made once, within a budget, or refused."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers.small_adapters import QUERY, config, make_base, tensors, write
from tests.helpers.tiny_models import make_tokenizer

from lorax_contract.adapters import (
    AdapterContent,
    AdapterPart,
    AdapterUnavailableError,
    Combination,
    MergeSpec,
    Reason,
)
from lorax_contract.errors import ShardError
from lorax_contract.step import AdapterHandle
from lorax_shard.adapters.prepare_lane import PrepareLane
from lorax_shard.fetching.sources.stream import _hashed
from lorax_shard.lora.delta import HostAdapter
from lorax_shard.lora.errors import AdapterMismatchError
from lorax_shard.peft.files import AdapterLimits
from lorax_shard.peft.read import read_adapter
from lorax_shard.store.store import AdapterStore

ONE, TWO, THREE = AdapterHandle(1), AdapterHandle(2), AdapterHandle(3)


@dataclass(frozen=True)
class Made:
    """What the preparer here makes of an adapter."""

    digest: str
    nbytes: int


class Preparer:
    """Counts what it makes; ``before`` runs first and may block or raise."""

    def __init__(self) -> None:
        self.made: list[str] = []
        self.before: Callable[[HostAdapter], None] = lambda _adapter: None

    def prepare(self, adapter: HostAdapter) -> Any:
        self.before(adapter)
        self.made.append(adapter.digest)
        return Made(adapter.digest, adapter.nbytes)


class Ticks:
    """A clock on which reading any adapter takes as long as the one before, or as told."""

    def __init__(self) -> None:
        self.now, self.step_s = 0.0, 1.0

    def __call__(self) -> float:
        self.now += self.step_s
        return self.now


class World:
    """A store with adapters, and a lane over it."""

    def __init__(self, folder: Path, host_bytes: int = 1 << 20) -> None:
        self.folder = folder
        self.store = AdapterStore(folder / "store", max_bytes=1 << 30)
        self.preparer, self.clock = Preparer(), Ticks()
        self.lane = PrepareLane(
            self.store,
            make_base(),
            AdapterLimits(),
            self.preparer,
            host_bytes=host_bytes,
            dtype=torch.float32,
            clock=self.clock,
        )

    def add(self, scale: float = 1.0, rank: int = 2, tokenizer: bool = False) -> AdapterPart:
        """Put an adapter into the store."""
        values = {name: scale * value for name, value in tensors(QUERY, rank=rank).items()}
        with self.store.fetching("version") as staging:
            write(staging.folder, config(r=rank), values)
            if tokenizer:
                make_tokenizer(staging.folder)
            digest = read_adapter(staging.folder, make_base(), AdapterLimits()).digest
            stored = [_hashed(path) for path in staging.folder.iterdir()]
            entry = self.store.commit(staging, stored, 1.0)
        return AdapterPart(digest, entry.digest)

    def prepare(self, handle: AdapterHandle, *parts: AdapterPart) -> Any:
        return self.lane.prepare(handle, AdapterContent(parts=parts))


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def failure(call: Callable[[], object]) -> AdapterUnavailableError:
    with pytest.raises(AdapterUnavailableError) as caught:
        call()
    return caught.value


def test_a_repeated_call_changes_nothing(world: World) -> None:
    part = world.add()
    first = world.prepare(ONE, part)
    assert first.device_bytes > 0
    assert world.prepare(ONE, part) is first
    assert world.preparer.made == [part.content_digest]
    ready = world.lane.ready(ONE)
    assert ready is not None
    assert (ready.tokenizer, ready.vocab_size) == (None, 0)


def test_calls_at_the_same_time_make_one(world: World) -> None:
    part = world.add()
    inside, go_on = threading.Semaphore(0), threading.Event()

    def wait(_adapter: HostAdapter) -> None:
        inside.release()
        assert go_on.wait(30)

    world.preparer.before = wait
    with ThreadPoolExecutor(4) as threads:
        calls = [threads.submit(world.prepare, ONE, part) for _ in range(4)]
        assert inside.acquire(timeout=30)
        assert world.lane.ready(ONE) is None
        assert world.lane.device_tier() == {}
        go_on.set()
        reports = {id(call.result(30)) for call in calls}
    assert len(reports) == 1
    assert len(world.preparer.made) == 1


def test_who_waited_for_a_call_that_failed_makes_it_visible(world: World) -> None:
    part = world.add()
    inside, go_on = threading.Event(), threading.Event()

    def fail_once(_adapter: HostAdapter) -> None:
        if not go_on.is_set():
            inside.set()
            assert go_on.wait(30)
            raise AdapterMismatchError("not this time")

    world.preparer.before = fail_once
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(world.prepare, ONE, part)
        assert inside.wait(30)
        second = threads.submit(world.prepare, ONE, part)
        # It waits for the first one's lock by now, or comes later: both must end well.
        go_on.set()
        assert "not this time" in failure(lambda: first.result(30)).text
        second.result(30)
    assert world.lane.ready(ONE) is not None
    assert list(world.lane.device_tier()) == [ONE]


def test_what_was_released_while_it_was_made_is_not_there_afterwards(world: World) -> None:
    part = world.add()
    inside, go_on = threading.Event(), threading.Event()

    def wait(_adapter: HostAdapter) -> None:
        inside.set()
        assert go_on.wait(30)

    world.preparer.before = wait
    with ThreadPoolExecutor(1) as threads:
        call = threads.submit(world.prepare, ONE, part)
        assert inside.wait(30)
        world.lane.release(ONE)
        go_on.set()
        call.result(30)
    assert world.lane.ready(ONE) is None
    assert world.lane.device_tier() == {}


def test_a_handle_never_names_another_content_while_it_is_held(world: World) -> None:
    one, two = world.add(1.0), world.add(2.0)
    world.prepare(ONE, one)
    with pytest.raises(ShardError, match="use a new handle"):
        world.prepare(ONE, two)
    world.lane.release(ONE)
    world.prepare(ONE, two)
    assert world.lane.device_tier()[ONE][0] == two.content_digest


def test_handles_with_equal_content_share_the_host_copy(world: World) -> None:
    part = world.add()
    world.prepare(ONE, part)
    copy = world.lane.host_copy(part)
    world.prepare(TWO, part)
    assert world.lane.host_copy(part) is copy
    assert world.lane.host_tier() == {part.content_digest: copy.nbytes}
    assert set(world.lane.device_tier()) == {ONE, TWO}


def test_the_tiers_say_what_is_there(world: World) -> None:
    one, two = world.add(1.0), world.add(2.0, rank=4)
    report = world.prepare(ONE, one)
    world.prepare(TWO, two)
    tiers = world.lane.device_tier()
    assert tiers[ONE] == (one.content_digest, report.device_bytes)
    assert world.lane.host_tier() == {
        part.content_digest: world.lane.host_copy(part).nbytes for part in (one, two)
    }
    world.lane.release(ONE)
    assert set(world.lane.device_tier()) == {TWO}
    assert set(world.lane.host_tier()) == {one.content_digest, two.content_digest}


def test_host_copies_stay_within_their_budget(tmp_path: Path) -> None:
    world = World(tmp_path)
    size = world.lane.host_copy(world.add(9.0)).nbytes
    world = World(tmp_path, host_bytes=2 * size)
    parts = [world.add(float(number)) for number in range(1, 4)]
    for handle, part in enumerate(parts, start=1):
        world.prepare(AdapterHandle(handle), part)
    assert set(world.lane.host_tier()) == {part.content_digest for part in parts[1:]}
    # Those on the device are none of it.
    assert set(world.lane.device_tier()) == {ONE, TWO, THREE}


def test_a_copy_that_is_dear_or_often_used_outlives_others(tmp_path: Path) -> None:
    world = World(tmp_path)
    size = world.lane.host_copy(world.add(9.0)).nbytes
    world = World(tmp_path, host_bytes=2 * size)
    dear, often, cheap, cheaper = (world.add(float(number)) for number in range(1, 5))
    world.clock.step_s = 100.0
    world.lane.host_copy(dear)
    world.clock.step_s = 1.0
    for part in (cheap, cheaper):
        world.lane.host_copy(part)
        assert set(world.lane.host_tier()) == {dear.content_digest, part.content_digest}
    world.clock.step_s = 10.0
    for _ in range(15):
        world.lane.host_copy(often)
    world.clock.step_s = 1.0
    world.lane.host_copy(cheap)
    assert set(world.lane.host_tier()) == {often.content_digest, cheap.content_digest}


def test_one_copy_may_pass_the_budget_alone(tmp_path: Path) -> None:
    world = World(tmp_path, host_bytes=1)
    one, two = world.add(1.0), world.add(2.0)
    world.prepare(ONE, one)
    assert set(world.lane.host_tier()) == {one.content_digest}
    world.prepare(TWO, two)
    assert set(world.lane.host_tier()) == {two.content_digest}


def test_a_merge_is_made_of_its_parts_copies(world: World) -> None:
    one, two = world.add(1.0), world.add(2.0)
    content = AdapterContent(
        parts=(one, two), merge=MergeSpec(weights=(0.5, 0.5), combination=Combination.LINEAR)
    )
    world.lane.prepare(ONE, content)
    assert world.lane.device_tier()[ONE][0] == content.key
    assert set(world.lane.host_tier()) == {one.content_digest, two.content_digest}


def test_parts_that_cannot_be_merged_are_refused_in_words(world: World) -> None:
    one, two = world.add(1.0, rank=2), world.add(1.0, rank=4)
    content = AdapterContent(
        parts=(one, two), merge=MergeSpec(weights=(0.5, 0.5), combination=Combination.LINEAR)
    )
    error = failure(lambda: world.lane.prepare(ONE, content))
    assert error.reason is Reason.REFUSED
    assert "rank" in error.text
    assert world.lane.ready(ONE) is None


def test_files_that_left_the_store_are_fetched_again_by_whoever_can(world: World) -> None:
    part = world.add()
    world.store.remove(part.store_digest)
    assert failure(lambda: world.prepare(ONE, part)).reason is Reason.EVICTED
    assert world.add() == part
    world.prepare(ONE, part)
    assert world.lane.ready(ONE) is not None


def test_a_host_copy_needs_no_files(world: World) -> None:
    part = world.add()
    copy = world.lane.host_copy(part)
    values = [delta.a.clone() for delta in copy.adapter.modules.values()]
    world.store.remove(part.store_digest)
    world.prepare(ONE, part)
    for delta, value in zip(copy.adapter.modules.values(), values, strict=True):
        assert torch.equal(delta.a, value)


def test_files_that_are_not_what_was_verified_are_found_out(world: World) -> None:
    part, other = world.add(1.0), world.add(2.0)
    for digest in (part.store_digest, other.store_digest):
        assert (world.folder / "store/entries" / digest).is_dir()
    weights = "adapter_model.safetensors"
    entries = world.folder / "store/entries"
    shutil.copy(entries / other.store_digest / weights, entries / part.store_digest / weights)
    error = failure(lambda: world.prepare(ONE, part))
    assert error.reason is Reason.CORRUPT
    assert world.lane.host_tier() == {}
    assert world.lane.device_tier() == {}


def test_an_adapter_that_does_not_fit_the_model_is_refused_in_words(world: World) -> None:
    def mismatch(_adapter: HostAdapter) -> None:
        raise AdapterMismatchError("it changes 'nothing'")

    world.preparer.before = mismatch
    part = world.add()
    error = failure(lambda: world.prepare(ONE, part))
    assert error.reason is Reason.REFUSED
    assert "it changes 'nothing'" in error.text
    assert world.lane.ready(ONE) is None


def test_its_own_tokenizer_comes_with_an_adapter(world: World) -> None:
    world.prepare(ONE, world.add(tokenizer=True))
    ready = world.lane.ready(ONE)
    assert ready is not None
    assert ready.tokenizer is not None
    assert ready.tokenizer.decode(ready.tokenizer.encode("lazy dog").ids) == "lazy dog"


def test_what_is_forgotten_leaves_memory_and_disk(world: World) -> None:
    part, other = world.add(1.0), world.add(2.0)
    world.prepare(ONE, part)
    world.prepare(TWO, other)
    world.lane.release(ONE, [part])
    assert set(world.lane.host_tier()) == {other.content_digest}
    assert world.store.entry(part.store_digest) is None
    assert world.store.entry(other.store_digest) is not None
    world.lane.release(ONE, [part])


def test_files_that_somebody_reads_stay(world: World) -> None:
    part = world.add()
    lease = world.store.lease(part.store_digest)
    assert lease is not None
    with lease:
        world.lane.release(ONE, [part])
        assert world.store.entry(part.store_digest) is not None
