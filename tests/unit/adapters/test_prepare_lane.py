"""Prepared adapters of one rank: made once, shared, released, or refused in words."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.helpers.lane_world import LaneWorld, failure
from tests.helpers.tiny_models import EOS

from lorax_contract.adapters import AdapterContent, Combination, MergeSpec, Reason
from lorax_contract.errors import ShardError
from lorax_contract.step import AdapterHandle
from lorax_shard.lora.delta import HostAdapter
from lorax_shard.lora.errors import AdapterMismatchError

ONE, TWO = AdapterHandle(1), AdapterHandle(2)


@pytest.fixture
def world(tmp_path: Path) -> LaneWorld:
    return LaneWorld(tmp_path)


def test_a_repeated_call_changes_nothing(world: LaneWorld) -> None:
    part = world.add()
    first = world.prepare(ONE, part)
    assert first.device_bytes > 0
    assert world.prepare(ONE, part) is first
    assert [adapter.digest for adapter in world.preparer.made] == [part.content_digest]
    ready = world.lane.ready(ONE)
    assert ready is not None
    assert (ready.vocabulary, ready.vocab_size) == (None, 0)


def test_calls_at_the_same_time_make_one(world: LaneWorld) -> None:
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


def test_who_waited_for_a_call_that_failed_makes_it_visible(world: LaneWorld) -> None:
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


def test_what_was_released_while_it_was_made_is_not_there_afterwards(world: LaneWorld) -> None:
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


def test_a_handle_never_names_another_content_while_it_is_held(world: LaneWorld) -> None:
    one, two = world.add(1.0), world.add(2.0)
    world.prepare(ONE, one)
    with pytest.raises(ShardError, match="use a new handle"):
        world.prepare(ONE, two)
    world.lane.release(ONE)
    world.prepare(ONE, two)
    assert world.lane.device_tier()[ONE][0] == two.content_digest


def test_handles_with_equal_content_share_the_host_copy(world: LaneWorld) -> None:
    part = world.add()
    world.prepare(ONE, part)
    copy = world.host.get(part)
    world.prepare(TWO, part)
    assert world.host.get(part) is copy
    assert world.host.sizes() == {part.content_digest: copy.nbytes}
    assert set(world.lane.device_tier()) == {ONE, TWO}


def test_the_tiers_say_what_is_there(world: LaneWorld) -> None:
    one, two = world.add(1.0), world.add(2.0, rank=4)
    report = world.prepare(ONE, one)
    world.prepare(TWO, two)
    tiers = world.lane.device_tier()
    assert tiers[ONE] == (one.content_digest, report.device_bytes)
    assert world.host.sizes() == {
        part.content_digest: world.host.get(part).nbytes for part in (one, two)
    }
    world.lane.release(ONE)
    assert set(world.lane.device_tier()) == {TWO}
    assert set(world.host.sizes()) == {one.content_digest, two.content_digest}


def test_a_merge_is_made_of_its_parts_copies(world: LaneWorld) -> None:
    one, two = world.add(1.0), world.add(2.0)
    content = AdapterContent(
        parts=(one, two), merge=MergeSpec(weights=(0.5, 0.5), combination=Combination.LINEAR)
    )
    world.lane.prepare(ONE, content)
    assert world.lane.device_tier()[ONE][0] == content.key
    assert set(world.host.sizes()) == {one.content_digest, two.content_digest}


def test_parts_that_cannot_be_merged_are_refused_in_words(world: LaneWorld) -> None:
    one, two = world.add(1.0, rank=2), world.add(1.0, rank=4)
    content = AdapterContent(
        parts=(one, two), merge=MergeSpec(weights=(0.5, 0.5), combination=Combination.LINEAR)
    )
    error = failure(lambda: world.lane.prepare(ONE, content))
    assert error.reason is Reason.REFUSED
    assert "rank" in error.text
    assert world.lane.ready(ONE) is None


def test_an_adapter_that_does_not_fit_the_model_is_refused_in_words(world: LaneWorld) -> None:
    def mismatch(_adapter: HostAdapter) -> None:
        raise AdapterMismatchError("it changes 'nothing'")

    world.preparer.before = mismatch
    part = world.add()
    error = failure(lambda: world.prepare(ONE, part))
    assert error.reason is Reason.REFUSED
    assert "it changes 'nothing'" in error.text
    assert world.lane.ready(ONE) is None


def test_its_own_tokenizer_comes_with_an_adapter(world: LaneWorld) -> None:
    world.prepare(ONE, world.add(tokenizer=True))
    ready = world.lane.ready(ONE)
    assert ready is not None
    assert ready.vocabulary is not None
    assert ready.vocabulary.token(ready.vocabulary.end_ids[0]) == EOS
