"""Adapters that are prepared beside the steps of a toy engine."""

from __future__ import annotations

import threading

from tests.helpers.toy_adapters import ToyAdapter, ToyPrepared

from lorax_contract.adapters import (
    AdapterContent,
    AdapterPart,
    AdapterUnavailableError,
    LoadReport,
    Reason,
)
from lorax_contract.step import AdapterHandle

QUICK, LARGE, SPENT = AdapterHandle(101), AdapterHandle(102), AdapterHandle(103)
PART = AdapterPart("content", "store")


class ReadyAdapters(ToyPrepared):
    """Prepares an adapter that favours its handle; the LARGE one while the gate is open."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.gate = threading.Event(), threading.Event()

    def prepare(self, handle: AdapterHandle, content: AdapterContent) -> LoadReport:
        if handle == SPENT:
            raise AdapterUnavailableError(Reason.EVICTED, "gone", retry_after_s=3.0)
        if handle == LARGE:
            self.inside.set()
            assert self.gate.wait(30)
        self[handle] = ToyAdapter(int(handle))
        return LoadReport(device_bytes=7, parse_s=0.5, copy_s=0.25)

    def release(self, handle: AdapterHandle) -> None:
        self.pop(handle, None)

    def forget_all(self) -> None:
        self.clear()

    def device_tier(self) -> dict[AdapterHandle, tuple[str, int]]:
        return dict.fromkeys(self, ("content", 7))
