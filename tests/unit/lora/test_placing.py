"""Adapters travel to a device in few copies, and take effect there by one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tests.helpers.layered_lora import NUM_LAYERS, Layers, layered_adapter
from torch.utils._python_dispatch import TorchDispatchMode

from lorax_shard.lora.model import LoraModel
from lorax_shard.lora.placing import DevicePlacement, HostPlacement, _tensors
from lorax_shard.lora.prepare import Preparer
from lorax_shard.lora.prepared import PreparedAdapter
from lorax_shard.lora.registry import BACKENDS
from lorax_shard.lora.sites import find_groups, find_sites

CPU, META = torch.device("cpu"), torch.device("meta")


class CopiesBetweenDevices(TorchDispatchMode):
    """Counts what goes from a host to another device."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [each for each in args if isinstance(each, torch.Tensor)]
        if isinstance(result, torch.Tensor) and result.device.type != "cpu":
            self.sizes += [each.nbytes for each in given if each.device.type == "cpu"]
        return result


class Copies(TorchDispatchMode):
    """Counts copies into tensors that are there."""

    def __init__(self) -> None:
        super().__init__()
        self.num = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num += func is torch.ops.aten.copy_.default
        return func(*args, **(kwargs or {}))


def preparer(device: torch.device) -> tuple[Preparer, dict[str, Any]]:
    sites = find_sites(Layers())
    return Preparer(sites, list(find_groups(sites)), torch.float32, device), sites


def test_an_adapter_travels_to_a_device_in_one_copy() -> None:
    prepare, sites = preparer(META)
    host = layered_adapter(sites)
    with CopiesBetweenDevices() as copies:
        prepared = prepare.prepare(host)
    assert all(tensor.device.type == "meta" for tensor in _tensors(prepared))
    assert len(copies.sizes) == 1
    assert copies.sizes[0] >= prepared.nbytes


@pytest.mark.parametrize("staging_bytes", [1 << 20, 4096, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_arrives_is_what_was_sent(staging_bytes: int, dtype: torch.dtype) -> None:
    """Also where the buffer holds a part of the adapter, or of one of its tensors."""
    prepare, sites = preparer(CPU)
    host = layered_adapter(sites, dtype=dtype)
    raw = prepare._convert(host)
    expected = HostPlacement(dtype).place(raw)
    placed = DevicePlacement(dtype, CPU, staging_bytes).place(raw)
    pairs = list(zip(_tensors(expected), _tensors(placed), strict=True))
    assert len(pairs) > 4 * NUM_LAYERS
    for one, other in pairs:
        assert torch.equal(one, other)
        assert other.is_contiguous()
        assert other.data_ptr() % 256 == other.untyped_storage().data_ptr() % 256
    assert placed.nbytes == expected.nbytes


@contextmanager
def counted_calls() -> Iterator[list[int]]:
    """Count the Python functions that are called within."""
    calls = [0]

    def note(frame: Any, event: str, argument: Any) -> None:
        calls[0] += event == "call"

    sys.setprofile(note)
    try:
        yield calls
    finally:
        sys.setprofile(None)


def work_of_a_load(num_slots: int) -> tuple[int, int]:
    """Return how many copies and calls it takes to fill a slot beside ``num_slots`` others."""
    lora = LoraModel(Layers(), BACKENDS.create("triton", CPU, torch.float32), CPU, torch.float32)
    prepared = [lora.prepare(layered_adapter(lora.sites, rank)) for rank in (2, 5)]
    lora.load(511, prepared[1])  # the table has its size from here on
    for slot in range(num_slots):
        lora.load(slot, prepared[slot % 2])
    with Copies() as copies:
        lora.load(500, prepared[0])
        lora.unload(500)
    with counted_calls() as calls:
        lora.load(500, prepared[0])
        lora.unload(500)
    assert isinstance(prepared[0], PreparedAdapter)
    return copies.num, calls[0]


def test_filling_a_slot_is_one_copy_whatever_the_others_hold() -> None:
    pytest.importorskip("triton", reason="triton does not run on this platform")
    few, many = work_of_a_load(2), work_of_a_load(100)
    assert few[0] == 2, "one to fill it, one to empty it"
    assert few == many
