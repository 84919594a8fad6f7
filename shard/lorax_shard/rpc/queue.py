"""The command queue: everything that changes the engine, strictly one after another."""

from __future__ import annotations

import asyncio
import itertools
import logging
import queue
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from lorax_contract.errors import (
    ShardError,
    ShardUnavailableError,
    StaleEpochError,
    UnhealthyError,
    ValidationError,
)
from lorax_shard.engine.self_test import DeviceBrokenError
from lorax_shard.parallel.group import GroupBrokenError

logger = logging.getLogger(__name__)

# After these nothing can be computed any more.
_BREAKING = (GroupBrokenError, DeviceBrokenError)

Result = TypeVar("Result")
Half = TypeVar("Half")


@dataclass(slots=True)
class _Job:
    command: Callable[[], Any]
    done: asyncio.Future[Any]
    # Makes the result of what the command returned; None: that is it.
    finish: Callable[[Any], Any] | None = None


class CommandQueue:
    """One worker thread runs commands in sequence; made and called in one event loop.

    A command may have a second half, ``finish``: a second thread runs these, in sequence too, while
    the worker runs the commands that follow. One without waits until all before it are finished.

    Calls with a sequence number run in its order: an early one waits for those
    before it, a repeated one gets the stored reply, a stale epoch is refused.
    Calls without a number run in the order in which they arrive. After a
    GroupBrokenError or a DeviceBrokenError nothing runs any more, and ``on_broken`` is told.
    """

    def __init__(
        self,
        epoch: int,
        *,
        gap_timeout_s: float = 30.0,
        num_kept_replies: int = 16,
        on_broken: Callable[[Exception], None] | None = None,
    ) -> None:
        self._epoch = epoch
        self._on_broken = on_broken
        self._gap_timeout_s = gap_timeout_s
        self._num_kept_replies = num_kept_replies
        self._loop = asyncio.get_running_loop()
        self._next_seq = 1
        # Calls that came before their turn, by seq; copies of one call share an entry.
        self._early: dict[int, list[asyncio.Future[None]]] = {}
        self._replies: OrderedDict[int, tuple[str, asyncio.Future[Any]]] = OrderedDict()
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._current: _Job | None = None
        self._closed = False
        # Nothing can be computed any more; known before whoever met it is told.
        self._is_broken = False
        self._breaking = threading.Lock()
        self._halves: queue.Queue[tuple[_Job, Any] | None] = queue.Queue()
        self._worker = threading.Thread(target=self._work, name="engine", daemon=True)
        self._finisher = threading.Thread(target=self._finish, name="outcomes", daemon=True)
        self._worker.start()
        self._finisher.start()

    @property
    def epoch(self) -> int:
        """Whose calls are served now."""
        return self._epoch

    def begin(self, epoch: int) -> None:
        """Serve the calls of another epoch; those of the one before that are in the queue run first.

        Raises StaleEpochError unless it is a later one.
        """
        if epoch <= self._epoch:
            raise StaleEpochError(
                f"epoch {epoch} cannot begin: this shard serves epoch {self._epoch}"
            )
        self._epoch, self._next_seq = epoch, 1
        self._replies.clear()
        for turn in itertools.chain(*self._early.values()):
            if not turn.done():
                turn.set_exception(StaleEpochError(f"the call was for an epoch before {epoch}"))

    def check_alive(self) -> None:
        """Raise UnhealthyError when the worker thread has ended, or is about to."""
        if self._is_broken or not self._worker.is_alive():
            raise UnhealthyError("the engine's thread has ended; restart the shard")

    async def run(
        self,
        command: Callable[[], Half],
        *,
        finish: Callable[[Half], Result] | None = None,
        epoch: int | None = None,
        seq: int | None = None,
        kind: str = "",
    ) -> Result:
        """Run a command in its turn and return its result, or what ``finish`` makes of it.

        A caller that goes away does not stop its command. ``kind`` says what is asked: only a
        call of the same kind gets the reply that is stored for its seq.
        """
        self._check_epoch(epoch, seq)
        if seq is None:
            return await asyncio.shield(self._enqueue(command, finish))
        if (stored := self._stored(seq, kind)) is not None:
            return await asyncio.shield(stored)
        if seq > self._next_seq:
            await self._wait_for_turn(seq)
            # Another epoch may have begun since it was woken.
            self.check_epoch(epoch)
            # Another copy of the call may have been woken first.
            if (stored := self._stored(seq, kind)) is not None:
                return await asyncio.shield(stored)
        done = self._enqueue(command, finish)
        self._replies[seq] = kind, done
        while len(self._replies) > self._num_kept_replies:
            self._replies.popitem(last=False)
        self._next_seq = seq + 1
        self._wake(self._next_seq)
        return await asyncio.shield(done)

    async def close(self, timeout_s: float) -> bool:
        """Let what was queued finish, end the worker, and tell whether it ended in time."""
        self._closed = True
        self._jobs.put(None)
        await asyncio.to_thread(self._worker.join, timeout_s)
        return not self._worker.is_alive()

    def check_epoch(self, epoch: int | None) -> None:
        """Raise StaleEpochError for a call that was meant for another incarnation."""
        if epoch is not None and epoch != self._epoch:
            raise StaleEpochError(
                f"the call is for epoch {epoch}, but this shard serves epoch {self._epoch}"
            )

    def _check_epoch(self, epoch: int | None, seq: int | None) -> None:
        self.check_epoch(epoch)
        if seq is not None and epoch is None:
            raise ValidationError("a call with a seq must name its epoch too")
        if seq is not None and seq < 1:
            raise ValidationError("the first seq of an epoch is 1")

    def _stored(self, seq: int, kind: str) -> asyncio.Future[Any] | None:
        """Return the reply of a call that came before; ShardError when it is kept no more."""
        if seq >= self._next_seq:
            return None
        if seq not in self._replies:
            raise ShardError(
                f"seq {seq} was executed before and its reply is not kept any more; "
                f"the last {self._num_kept_replies} are"
            )
        stored_kind, done = self._replies[seq]
        if stored_kind != kind:
            raise ValidationError(f"seq {seq} was executed before as another kind of call")
        return done

    async def _wait_for_turn(self, seq: int) -> None:
        turn: asyncio.Future[None] = self._loop.create_future()
        waiting = self._early.setdefault(seq, [])
        waiting.append(turn)
        try:
            await asyncio.wait_for(turn, self._gap_timeout_s)
        except TimeoutError:
            raise ShardError(
                f"seq {seq} waited {self._gap_timeout_s:g} s for seq {self._next_seq}, "
                "which did not come"
            ) from None
        finally:
            waiting.remove(turn)
            if not waiting:
                self._early.pop(seq, None)

    def _wake(self, seq: int) -> None:
        for turn in self._early.get(seq, ()):
            if not turn.done():
                turn.set_result(None)

    def _enqueue(
        self, command: Callable[[], Any], finish: Callable[[Any], Any] | None
    ) -> asyncio.Future[Any]:
        if self._closed:
            raise ShardUnavailableError("the shard is stopping and takes no more calls")
        if self._is_broken or not self._worker.is_alive():
            raise _ended()
        done: asyncio.Future[Any] = self._loop.create_future()
        # A stored failure may never be asked for again; that is no news for the log.
        done.add_done_callback(lambda future: future.cancelled() or future.exception())
        self._jobs.put(_Job(command, done, finish))
        return done

    def _work(self) -> None:
        try:
            while (job := self._jobs.get()) is not None:
                self._current = job
                if self._is_broken:
                    break
                self._run(job)
                self._current = None
            if self._is_broken:
                self._abandon()
        except BaseException:
            logger.critical("the engine's thread ends by an error", exc_info=True)
            self._abandon()
        finally:
            self._halves.put(None)
            self._finisher.join()

    def _run(self, job: _Job) -> None:
        if job.finish is None:
            self._halves.join()
        # To be found broken meanwhile is as good as to be found broken by the command.
        result, error = _executed(_raise_ended if self._is_broken else job.command)
        if isinstance(error, _BREAKING):
            self._break(job, error)
        elif error is None and job.finish is not None:
            self._halves.put((job, result))
        else:
            self._answer(job, result, error)

    def _finish(self) -> None:
        """Make results of what commands returned."""
        while (half := self._halves.get()) is not None:
            job, given = half
            assert job.finish is not None
            result, error = _executed(partial(job.finish, given))
            if isinstance(error, _BREAKING):
                self._break(job, error)
            else:
                self._answer(job, result, error)
            self._halves.task_done()

    def _break(self, job: _Job, error: Exception) -> None:
        """Compute nothing more: a collective with a rank that is gone would never end."""
        with self._breaking:
            is_first, self._is_broken = not self._is_broken, True
        self._answer(job, None, ShardUnavailableError(str(error)))
        # Wakes the worker, which then answers all that wait.
        self._jobs.put(None)
        if is_first and self._on_broken is not None:
            self._on_broken(error)

    def _abandon(self) -> None:
        """Answer all that wait; the thread is about to end."""
        if self._current is not None:
            self._answer(self._current, None, _ended())
        while not self._jobs.empty():
            if (job := self._jobs.get()) is not None:
                self._answer(job, None, _ended())

    def _answer(self, job: _Job, result: Any, error: Exception | None) -> None:
        def resolve() -> None:
            if job.done.done():
                return
            if error is None:
                job.done.set_result(result)
            else:
                job.done.set_exception(error)

        try:
            self._loop.call_soon_threadsafe(resolve)
        except RuntimeError:  # the loop is closed: nobody waits any more
            logger.debug("an answer came after the event loop had closed")


def _ended() -> ShardUnavailableError:
    return ShardUnavailableError("the engine's thread has ended; restart the shard")


def _raise_ended() -> None:
    raise _ended()


def _executed(command: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return command(), None
    except Exception as error:  # noqa: BLE001 - the caller gets it
        return None, error
