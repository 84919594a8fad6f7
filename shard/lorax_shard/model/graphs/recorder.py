"""Recording what a call launches, so that it can be computed again without the call."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

import torch


class GraphRecorder(Protocol):
    """Makes graphs of one device."""

    def record(self, call: Callable[[], None]) -> Callable[[], None]:
        """Record what a call launches; return what computes it again, over the same tensors.

        The call has been made before at least once: nothing is compiled in it.
        """


# Captures that failed: torch may look at them as long as it allocates.
_FAILED: list[torch.cuda.CUDAGraph] = []


class CudaRecorder:
    """Captures CUDA graphs that share their memory: one is replayed after the other.

    Owns their pool; ``stream`` is used for this alone, and by one recorder after the other.
    """

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream
        self._pool = torch.cuda.graph_pool_handle()
        # Also those that nobody wants: with the last one the pool would end.
        self._graphs: list[torch.cuda.CUDAGraph] = []

    def record(self, call: Callable[[], None]) -> Callable[[], None]:
        """Capture a call on a stream of its own."""
        graph = torch.cuda.CUDAGraph()
        self._graphs.append(graph)
        torch.cuda.synchronize()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            # Libraries make their workspaces at their first call on a stream.
            call()
            torch.cuda.synchronize()
            # While a graph is captured nothing that is kept for later can be given back.
            torch.cuda.empty_cache()
            try:
                self._capture(graph, call)
            except BaseException:
                self._give_up(graph)
                raise
        torch.cuda.current_stream().wait_stream(self._stream)
        replay: Callable[[], None] = graph.replay
        return replay

    def _capture(self, graph: torch.cuda.CUDAGraph, call: Callable[[], None]) -> None:
        # What torch makes for its random numbers belongs to no inference.
        with torch.inference_mode(False):
            # Other threads, which prepare adapters, go on calling CUDA.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        call()
        graph.capture_end()

    def _give_up(self, graph: torch.cuda.CUDAGraph) -> None:
        """End a capture that failed, all of it.

        ``capture_end`` of torch before 2.13 raises for such a capture before it has told its allocator,
        which would go on as if it were captured: it gives nothing back any more.
        """
        _FAILED.append(graph)
        with suppress(Exception):
            graph.capture_end()
        with suppress(Exception):
            end: Any = torch._C._cuda_endAllocateToPool
            end(torch.cuda.current_device(), self._pool)
        self._pool = torch.cuda.graph_pool_handle()
