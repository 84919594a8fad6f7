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

        The call has been made before at least once, here too: nothing is compiled in it.
        """


class CudaRecorder:
    """Captures CUDA graphs that share their memory: one is replayed after the other."""

    def __init__(self, device: torch.device) -> None:
        stream: Any = torch.cuda.Stream
        self._stream = stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, call: Callable[[], None]) -> Callable[[], None]:
        """Capture a call on a stream of its own."""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            # Libraries make their workspaces at their first call on a stream.
            call()
            torch.cuda.synchronize()
            # Other threads, which prepare adapters, go on calling CUDA.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                call()
            except BaseException:
                with suppress(Exception):
                    graph.capture_end()
                raise
            graph.capture_end()
        torch.cuda.current_stream().wait_stream(self._stream)
        replay: Callable[[], None] = graph.replay
        return replay
