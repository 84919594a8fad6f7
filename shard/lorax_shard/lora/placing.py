"""Where a prepared adapter lies: its tensors go to the model's device together.

An adapter is hundreds of small tensors. On a CPU those that a step reads are copied into one
mapping; to a GPU they travel through one pinned buffer, in one copy for as many as it holds, on
a stream of their own: no step waits for them.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch

from lorax_shard.lora.arena import Copy, gather
from lorax_shard.lora.prepared import PreparedAdapter

# Bytes of the pinned buffer: adapters of usual ranks are a copy or two.
_STAGING_BYTES = 64 << 20
# Tensors begin at multiples of this on a device.
_ALIGNMENT = 256


class Placement(ABC):
    """Puts adapters where steps compute, in the model's dtype but for ids; any thread."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def within(self) -> AbstractContextManager[object]:
        """Return what surrounds the preparation of an adapter."""
        return nullcontext()

    @abstractmethod
    def place(self, adapter: PreparedAdapter) -> PreparedAdapter:
        """Return the adapter as steps read it."""

    def _dtype_of(self, tensor: torch.Tensor) -> torch.dtype:
        return self._dtype if tensor.is_floating_point() else tensor.dtype


class HostPlacement(Placement):
    """Gathers the matrices of all groups; what is read rarely stays where it is.

    With ``keeps_stored`` the matrices keep the types that they come with. ``pack`` writes them in
    panels.
    """

    def __init__(
        self, dtype: torch.dtype, *, keeps_stored: bool = False, pack: Copy | None = None
    ) -> None:
        super().__init__(dtype)
        self._low_rank_dtype = None if keeps_stored else dtype
        self._pack = pack

    def place(self, adapter: PreparedAdapter) -> PreparedAdapter:
        """Return the adapter with its low-rank matrices in one mapping."""
        low_rank = (adapter.groups, adapter.routers)
        matrices = iter(gather(list(_tensors(low_rank)), self._low_rank_dtype, self._pack))
        groups, routers = _mapped(low_rank, lambda _: next(matrices))
        if self._pack is not None:
            groups, routers = (
                {key: replace(each, in_panels=True) for key, each in part.items()}
                for part in (groups, routers)
            )
        others = replace(adapter, groups={}, routers={}, experts={})
        rest: PreparedAdapter = _mapped(others, self._cast)
        # Those of experts were put in memory of their own when they were made.
        return replace(rest, groups=groups, routers=routers, experts=adapter.experts)

    def _cast(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._dtype_of(tensor)).contiguous()


class DevicePlacement(Placement):
    """Owns the pinned buffer and the stream that adapters travel on."""

    def __init__(
        self, dtype: torch.dtype, device: torch.device, staging_bytes: int = _STAGING_BYTES
    ) -> None:
        super().__init__(dtype)
        self._device, self._staging_bytes = device, staging_bytes
        stream: Any = torch.cuda.Stream
        self._stream = stream(device) if device.type == "cuda" else None
        # Made for the first adapter.
        self._staging = torch.empty(0, dtype=torch.uint8)
        self._lock = threading.Lock()

    def within(self) -> AbstractContextManager[object]:
        """Return a context in which this thread's work on the device is on the own stream."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def place(self, adapter: PreparedAdapter) -> PreparedAdapter:
        """Return the adapter on the device, all of it there."""
        host = [tensor for tensor in _tensors(adapter) if tensor.device.type == "cpu"]
        moved = iter(self._carry(host))

        def change(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.device.type == "cpu":
                return next(moved)
            return tensor.to(self._dtype_of(tensor)).contiguous()

        placed: PreparedAdapter = _mapped(adapter, change)
        if self._stream is not None:
            self._stream.synchronize()
            # Steps read it on their own stream: it is not given to others before they have.
            for tensor in _tensors(placed):
                tensor.record_stream(torch.cuda.default_stream(self._device))
        return placed

    def _carry(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        sizes = [tensor.numel() * self._dtype_of(tensor).itemsize for tensor in tensors]
        starts, end = [], 0
        for size in sizes:
            starts.append(end)
            end += -(-size // _ALIGNMENT) * _ALIGNMENT
        target = torch.empty(end, dtype=torch.uint8, device=self._device)
        with self._lock:
            self._fill(target, tensors, starts, sizes)
        return [
            target[start : start + size].view(self._dtype_of(tensor)).view(tensor.shape)
            for tensor, start, size in zip(tensors, starts, sizes, strict=True)
        ]

    def _fill(
        self,
        target: torch.Tensor,
        tensors: Sequence[torch.Tensor],
        starts: Sequence[int],
        sizes: Sequence[int],
    ) -> None:
        """Write the tensors to their places in ``target``, as many at once as the buffer holds."""
        if not len(self._staging):
            pin = self._device.type == "cuda"
            self._staging = torch.empty(self._staging_bytes, dtype=torch.uint8, pin_memory=pin)
        first = used = 0  # what the buffer holds is for ``target`` from ``first`` on
        for tensor, start, size in zip(tensors, starts, sizes, strict=True):
            if start + size - first > self._staging_bytes:
                self._flush(target, first, used)
                first, used = start, 0
            if size > self._staging_bytes:
                first = self._fill_large(target, tensor, start)
                continue
            used = start + size - first
            place = self._staging[start - first : used]
            place.view(self._dtype_of(tensor)).view(tensor.shape).copy_(tensor)
        self._flush(target, first, used)

    def _fill_large(self, target: torch.Tensor, tensor: torch.Tensor, start: int) -> int:
        """Write a tensor that the buffer does not hold piece by piece; return where it ends."""
        raw = tensor.to(self._dtype_of(tensor)).contiguous().view(-1).view(torch.uint8)
        for piece in torch.split(raw, self._staging_bytes):
            self._staging[: len(piece)].copy_(piece)
            self._flush(target, start, len(piece))
            start += len(piece)
        return -(-start // _ALIGNMENT) * _ALIGNMENT

    def _flush(self, target: torch.Tensor, first: int, used: int) -> None:
        if used:
            target[first : first + used].copy_(self._staging[:used], non_blocking=True)
            if self._stream is not None:
                self._stream.synchronize()


def make_placement(
    dtype: torch.dtype,
    device: torch.device,
    *,
    keeps_stored: bool = False,
    pack: Copy | None = None,
) -> Placement:
    """Return how adapters get to a device; on a CPU their matrices may keep types, and be packed."""
    if device.type == "cpu":
        return HostPlacement(dtype, keeps_stored=keeps_stored, pack=pack)
    return DevicePlacement(dtype, device)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors of nested dataclasses, mappings and tuples, in their order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))
    elif isinstance(value, Mapping | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(part)


def _mapped(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Return nested dataclasses, mappings and tuples with other tensors, asked for in their order."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if is_dataclass(value) and not isinstance(value, type):
        parts = {each.name: getattr(value, each.name) for each in fields(value)}
        return replace(value, **{name: _mapped(part, change) for name, part in parts.items()})
    if isinstance(value, Mapping):
        return {key: _mapped(part, change) for key, part in value.items()}
    return tuple(_mapped(part, change) for part in value) if isinstance(value, tuple) else value
