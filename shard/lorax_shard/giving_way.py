"""Large jobs beside steps: they work in short slices, and pause while others want their processor.

A thread of a step that waits a moment for another one loses its processor to whoever is ready, and
gets it back some milliseconds later, whatever that one's ``nice`` is. So a job of many seconds makes
every step longer as long as it lasts. Here it asks the system after each slice for how long it had to
wait for a processor itself: not at all where one is to spare, and then it goes on at once.

    with in_slices(num_bytes, patience_s):
        for piece in pieces:
            work(piece)
            rest()
"""

from __future__ import annotations

import contextlib
import os
import resource
import threading
import time
from collections.abc import Callable, Iterator

# What works piece by piece takes so many bytes at once: a fraction of a millisecond as a rule.
PIECE_BYTES = 256 << 10
# Below this nobody notices a job, and whoever asked for it waits for its first token.
_LARGE_BYTES = 64 << 20
_SLICE_S = 0.0008
# At most it pauses for so many times what it computed: a seventeenth of a processor is left to it.
_MOST_PAUSES = 16.0
_LONGEST_PAUSE_S, _SHORTEST_PAUSE_S = 0.1, 0.0002
# A processor that it had to wait for so long is wanted by others.
_WAITED_S = 0.0001
# How much the last slice says about the next one.
_WEIGHT = 1 / 8
# Parts of its patience: it gives way as much as it can, and then less and less.
_FULL_UNTIL, _NONE_FROM = 1 / 3, 2 / 3


class SlicedJob:
    """Decides after each slice of one thread's job how long that pauses.

    Args:
        patience_s: the time that the whole job has. Well before it is over nothing pauses any more.
        waited: seconds for which this thread has waited for a processor, since it began.
        computed: seconds for which it had one.
    """

    def __init__(
        self,
        patience_s: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        computed: Callable[[], float] = time.thread_time,
        waited: Callable[[], float] | None = None,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._patience_s = patience_s
        self._clock, self._computed, self._pause = clock, computed, pause
        self._waited = waited or seconds_waited
        self._began = self._since = clock()
        self._used, self._lost = computed(), self._waited()
        # Between 0 and 1: how much others want this processor.
        self._wanted = 0.0

    def rest(self) -> None:
        """Pause if a slice is over and others want the processor."""
        now = self._clock()
        if now - self._since < _SLICE_S:
            return
        used, lost = self._computed(), self._waited()
        # What it waited for since its last slice ended: when its pause was over, and within this one.
        is_wanted = lost - self._lost > _WAITED_S
        self._wanted += (is_wanted - self._wanted) * _WEIGHT
        pause_s = (used - self._used) * _MOST_PAUSES * self._wanted * self._share(now)
        self._used, self._lost = used, lost
        if pause_s > _SHORTEST_PAUSE_S:
            self._pause(min(pause_s, _LONGEST_PAUSE_S))
        self._since = self._clock()

    def _share(self, now: float) -> float:
        """Return how much of a pause is left to a job of this age."""
        age = (now - self._began) / self._patience_s if self._patience_s > 0 else 1.0
        return min(1.0, max(0.0, (_NONE_FROM - age) / (_NONE_FROM - _FULL_UNTIL)))


def seconds_waited() -> float:
    """Return for how long this thread was ready and had no processor.

    Where the system does not say: how often it lost one, as if each time were long.
    """
    try:
        descriptor = os.open("/proc/thread-self/schedstat", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return float(resource.getrusage(_THREAD).ru_nivcsw)
    try:
        return int(os.read(descriptor, 100).split()[1]) * 1e-9
    finally:
        os.close(descriptor)


# Of a thread where there is such a count, which is where a thread has a ``nice`` of its own.
_THREAD = getattr(resource, "RUSAGE_THREAD", resource.RUSAGE_SELF)
_threads = threading.local()


@contextlib.contextmanager
def in_slices(num_bytes: int, patience_s: float) -> Iterator[None]:
    """Have this thread's work on so many bytes give way wherever it calls ``rest``, if they are many."""
    if num_bytes < _LARGE_BYTES:
        yield
        return
    outer = getattr(_threads, "job", None)
    _threads.job = outer or SlicedJob(patience_s)
    try:
        yield
    finally:
        _threads.job = outer


def rest() -> None:
    """Pause if this thread's job is a large one and others want its processor."""
    job: SlicedJob | None = getattr(_threads, "job", None)
    if job is not None:
        job.rest()
