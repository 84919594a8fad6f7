"""Kernels of a CPU compiled while a model is fetched and converted, which takes one core."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

logger = logging.getLogger(__name__)


class WorkBeside:
    """Work in a thread that begins once there is something to do beside which it costs no time."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        """Begin, unless it has begun."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="kernels", daemon=True)
            self._thread.start()

    def wait(self) -> None:
        """Return when what has begun is done."""
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            self._work()
        except Exception as error:  # noqa: BLE001 - whoever needs the kernels says what is wrong
            logger.debug("kernels are compiled when they are needed: %s", error)


def compile_kernels() -> None:
    """Compile what float32 is served with on this CPU, as far as that is not done."""
    import torch

    from lorax_shard.attention.cpp import CppAttention
    from lorax_shard.fused.cpp import CppElementwise
    from lorax_shard.linear.panel import PanelBackend
    from lorax_shard.lora.cpp import CppLora
    from lorax_shard.model.programs.operations import operations
    from lorax_shard.sampling.kernel import DrawKernel

    for backend in (CppAttention, PanelBackend, CppElementwise, CppLora):
        backend.probe(torch.device("cpu"), torch.float32)
    DrawKernel.probe()
    operations()
