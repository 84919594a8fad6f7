"""The command queue: strict sequence, whatever order calls arrive in."""

from __future__ import annotations

import asyncio
import random
import threading

import pytest

from lorax_contract.errors import (
    ShardError,
    ShardUnavailableError,
    StaleEpochError,
    UnhealthyError,
    ValidationError,
)
from lorax_shard.engine.self_test import DeviceBrokenError
from lorax_shard.parallel.group import GroupBrokenError
from lorax_shard.rpc.queue import CommandQueue


def with_queue(test, **options):
    """Run a coroutine function over a queue of epoch 3 and close it."""

    async def main():
        queue = CommandQueue(3, **options)
        try:
            await test(queue)
        finally:
            await queue.close(5.0)

    asyncio.run(main())


def test_commands_run_in_order_of_seq_however_they_arrive():
    ran = []

    async def test(queue):
        seqs = list(range(1, 40))
        random.Random(5).shuffle(seqs)
        calls = [
            asyncio.create_task(queue.run(lambda seq=seq: ran.append(seq) or seq, epoch=3, seq=seq))
            for seq in seqs
        ]
        assert await asyncio.gather(*calls) == seqs

    with_queue(test)
    assert ran == list(range(1, 40))


def test_a_gap_that_stays_open_is_said_in_words():
    async def test(queue):
        with pytest.raises(ShardError, match=r"seq 3 waited .* for seq 1"):
            await queue.run(lambda: 1, epoch=3, seq=3)
        # The call that timed out left nothing behind.
        assert await queue.run(lambda: "first", epoch=3, seq=1) == "first"

    with_queue(test, gap_timeout_s=0.01)


def test_a_repeated_seq_gets_the_stored_reply():
    ran = []

    async def test(queue):
        calls = [queue.run(lambda: ran.append(1) or len(ran), epoch=3, seq=1) for _ in range(3)]
        assert await asyncio.gather(*calls) == [1, 1, 1]
        assert await queue.run(lambda: ran.append(1), epoch=3, seq=1) == 1

    with_queue(test)
    assert ran == [1]


def test_another_kind_of_call_does_not_get_the_stored_reply():
    async def test(queue):
        assert await queue.run(lambda: "a step", epoch=3, seq=1, kind="step") == "a step"
        with pytest.raises(ValidationError, match="seq 1 was executed before as another kind"):
            await queue.run(lambda: "a batch", epoch=3, seq=1, kind="batch")
        assert await queue.run(lambda: "never", epoch=3, seq=1, kind="step") == "a step"

    with_queue(test)


def test_a_repeated_failure_fails_again_without_running():
    ran = []

    def fail():
        ran.append(1)
        raise ValueError("bad step")

    async def test(queue):
        for _ in range(2):
            with pytest.raises(ValueError, match="bad step"):
                await queue.run(fail, epoch=3, seq=1)
        assert await queue.run(lambda: "on", epoch=3, seq=2) == "on"

    with_queue(test)
    assert ran == [1]


def test_copies_of_an_early_call_run_it_once():
    ran = []

    async def test(queue):
        early = [
            asyncio.create_task(queue.run(lambda: ran.append(2) or "two", epoch=3, seq=2))
            for _ in range(2)
        ]
        await asyncio.sleep(0)
        assert await queue.run(lambda: ran.append(1) or "one", epoch=3, seq=1) == "one"
        assert await asyncio.gather(*early) == ["two", "two"]

    with_queue(test)
    assert ran == [1, 2]


def test_an_early_call_whose_caller_leaves_does_not_hold_up_its_copy():
    async def test(queue):
        gone = asyncio.create_task(queue.run(lambda: "two", epoch=3, seq=2))
        stays = asyncio.create_task(queue.run(lambda: "two", epoch=3, seq=2))
        await asyncio.sleep(0)
        gone.cancel()
        await queue.run(lambda: "one", epoch=3, seq=1)
        assert await stays == "two"

    with_queue(test)


def test_a_caller_that_leaves_does_not_stop_its_command():
    ran = threading.Event()

    async def test(queue):
        call = asyncio.create_task(queue.run(ran.set, epoch=3, seq=1))
        await asyncio.sleep(0)
        call.cancel()
        assert await queue.run(lambda: "next", epoch=3, seq=2) == "next"

    with_queue(test)
    assert ran.is_set()


def test_a_reply_that_is_kept_no_more_is_said_in_words():
    async def test(queue):
        for seq in range(1, 5):
            await queue.run(lambda seq=seq: seq, epoch=3, seq=seq)
        assert await queue.run(lambda: 0, epoch=3, seq=3) == 3
        with pytest.raises(ShardError, match="not kept any more"):
            await queue.run(lambda: 0, epoch=3, seq=2)

    with_queue(test, num_kept_replies=2)


def test_foreign_epochs_and_half_given_numbers_are_refused():
    async def test(queue):
        with pytest.raises(StaleEpochError, match=r"epoch 2.*epoch 3"):
            await queue.run(lambda: 0, epoch=2, seq=1)
        with pytest.raises(StaleEpochError):
            await queue.run(lambda: 0, epoch=4)
        with pytest.raises(ValidationError, match="epoch"):
            await queue.run(lambda: 0, seq=1)
        with pytest.raises(ValidationError, match="first seq"):
            await queue.run(lambda: 0, epoch=3, seq=0)
        assert await queue.run(lambda: "fine", epoch=3, seq=1) == "fine"

    with_queue(test)


def test_another_epoch_begins_with_seq_1_and_ends_what_waits_for_the_one_before():
    async def test(queue):
        assert await queue.run(lambda: "old", epoch=3, seq=1) == "old"
        early = asyncio.create_task(queue.run(lambda: "never", epoch=3, seq=4))
        await asyncio.sleep(0)
        started, go_on = threading.Event(), threading.Event()
        slow = asyncio.create_task(
            queue.run(lambda: started.set() or go_on.wait(9), epoch=3, seq=2)
        )
        await asyncio.to_thread(started.wait, 9)
        queue.begin(7)
        assert queue.epoch == 7
        with pytest.raises(StaleEpochError, match="before 7"):
            await early
        with pytest.raises(StaleEpochError, match="serves epoch 7"):
            await queue.run(lambda: "late", epoch=3, seq=3)
        new = asyncio.create_task(queue.run(lambda: "new", epoch=7, seq=1))
        await asyncio.sleep(0)
        assert not new.done()
        go_on.set()
        assert (await slow, await new) == (True, "new")
        for epoch in (3, 7):
            with pytest.raises(StaleEpochError, match="cannot begin"):
                queue.begin(epoch)

    with_queue(test)


def test_calls_without_a_number_run_as_they_come():
    ran = []

    async def test(queue):
        await asyncio.gather(*(queue.run(lambda i=i: ran.append(i)) for i in range(20)))

    with_queue(test)
    assert ran == list(range(20))


def test_a_dead_worker_is_noticed():
    def die():
        raise SystemExit(1)

    async def test(queue):
        queue.check_alive()
        calls = [queue.run(die), queue.run(lambda: "never")]
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(result) for result in results] == [ShardUnavailableError] * 2
        await asyncio.to_thread(queue._worker.join, 5.0)
        with pytest.raises(UnhealthyError):
            queue.check_alive()
        with pytest.raises(ShardUnavailableError):
            await queue.run(lambda: "never")

    with_queue(test)


def test_closing_finishes_what_was_queued_and_takes_nothing_new():
    async def test(queue):
        gate = threading.Event()
        slow = asyncio.create_task(queue.run(lambda: gate.wait(5) and "done"))
        await asyncio.sleep(0)
        closing = asyncio.create_task(queue.close(5.0))
        await asyncio.sleep(0)
        with pytest.raises(ShardUnavailableError, match="stopping"):
            await queue.run(lambda: "late")
        gate.set()
        assert await slow == "done"
        assert await closing

    with_queue(test)


@pytest.mark.parametrize("half", ["first", "second"])
@pytest.mark.parametrize("error", [GroupBrokenError("rank 1"), DeviceBrokenError("no device")])
def test_what_breaks_the_engine_ends_all_calls_and_is_told(error, half):
    told = []

    def fail(*_given):
        raise error

    async def test(queue):
        first = queue.run(fail) if half == "first" else queue.run(lambda: 1, finish=fail)
        calls = [first, queue.run(lambda: "never")]
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(result) for result in results] == [ShardUnavailableError] * 2
        assert str(error) in str(results[0])
        await asyncio.to_thread(queue._worker.join, 5.0)
        with pytest.raises(UnhealthyError):
            queue.check_alive()

    with_queue(test, on_broken=told.append)
    assert told == [error]


def test_second_halves_run_in_order_beside_the_commands_that_follow():
    """The third command begins while the first is being finished."""
    finished, third_ran = [], threading.Event()

    def finish(number):
        if number == 1:
            assert third_ran.wait(5.0)
        finished.append(number)
        return 10 * number

    async def test(queue):
        calls = [
            queue.run(lambda n=n: (third_ran.set() if n == 3 else None, n)[1], finish=finish,
                      epoch=3, seq=n)
            for n in (1, 2, 3)
        ]  # fmt: skip
        assert await asyncio.gather(*calls) == [10, 20, 30]

    with_queue(test)
    assert finished == [1, 2, 3]


def test_a_command_without_a_second_half_finds_all_before_it_finished():
    finished, may_finish = [], threading.Event()

    def finish(number):
        may_finish.wait(5.0)
        finished.append(number)

    async def test(queue):
        first = asyncio.create_task(queue.run(lambda: 1, finish=finish, epoch=3, seq=1))
        seen = asyncio.create_task(queue.run(lambda: list(finished), epoch=3, seq=2))
        await asyncio.sleep(0)
        may_finish.set()
        assert await seen == [1]
        await first

    with_queue(test)


def test_a_second_half_that_fails_is_the_failure_of_its_call_alone():
    def finish(number):
        if number == 1:
            raise ValueError("no outcome")
        return number

    async def test(queue):
        first = asyncio.create_task(queue.run(lambda: 1, finish=finish, epoch=3, seq=1))
        second = asyncio.create_task(queue.run(lambda: 2, finish=finish, epoch=3, seq=2))
        with pytest.raises(ValueError, match="no outcome"):
            await first
        assert await second == 2

    with_queue(test)


def test_what_was_launched_is_finished_though_the_device_breaks_behind_it():
    may_finish = threading.Event()

    def finish(number):
        may_finish.wait(5.0)
        return number

    def breaks():
        raise DeviceBrokenError("gone")

    async def test(queue):
        first = asyncio.create_task(queue.run(lambda: 1, finish=finish, epoch=3, seq=1))
        second = asyncio.create_task(queue.run(breaks, finish=finish, epoch=3, seq=2))
        with pytest.raises(ShardUnavailableError, match="gone"):
            await second
        may_finish.set()
        assert await first == 1

    with_queue(test)
