"""Notes what a model's code asks of kernels and of torch in one pass."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lorax_shard.model.programs.operations import as_native
from lorax_shard.native import NativeFunction, noting_calls

_aten = torch.ops.aten
# They give memory for whoever writes it.
_FACTORIES = frozenset(
    {
        _aten.empty.memory_format,
        _aten.empty_like.default,
        _aten.empty_strided.default,
        _aten.new_empty.default,
        _aten.new_empty_strided.default,
    }
)
# They give what they are given where it is of the kind that is asked for, which no pass changes.
_CONVERSIONS = frozenset(
    {
        _aten.to.dtype,
        _aten.to.dtype_layout,
        _aten.to.device,
        _aten.resolve_conj.default,
        _aten.resolve_neg.default,
    }
)
_READS = frozenset({_aten.item.default, _aten.is_nonzero.default, _aten.equal.default})
# What they give depends on numbers, which are other ones in each pass.
_READING_TAGS = frozenset({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape})


class NotAProgramError(Exception):
    """A pass does what no program repeats; the words say what."""


class OutputOf(NamedTuple):
    """A tensor that an operation of torch gives: which of its results."""

    operation: int
    result: int


class InputOf(NamedTuple):
    """A tensor that a pass is given."""

    name: str


class Place(NamedTuple):
    """A tensor over memory that kernels write."""

    storage: int
    offset: int  # in numbers
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Operation(NamedTuple):
    """What torch computes itself, with tensors as they are found again."""

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class KernelCall(NamedTuple):
    """A kernel and its fields, and what memory each field points into; -1: into none that changes."""

    function: NativeFunction
    fields: NDArray[np.int64]
    storages: NDArray[np.int64]


class Memory(NamedTuple):
    """Where a recorded pass had its tensors."""

    address: int
    nbytes: int
    # None: whoever asks gets it, and kernels write it.
    origin: OutputOf | InputOf | None


@dataclass(slots=True)
class Recording:
    """One pass. ``before`` comes before all kernels and needs nothing of them, ``after`` the contrary."""

    memories: list[Memory] = field(default_factory=list)
    calls: list[KernelCall] = field(default_factory=list)
    # Numbers of operations, all counted together, and what they are.
    before: dict[int, Operation] = field(default_factory=dict)
    after: dict[int, Operation] = field(default_factory=dict)
    result: Any = None


def record(compute: Callable[[], Any], inputs: Mapping[str, torch.Tensor]) -> Recording:
    """Compute a pass and return what it consists of; NotAProgramError says what cannot be repeated.

    It returns a tensor, or several.
    """
    recorder = _Recorder(inputs)
    with noting_calls(recorder.note), recorder:
        result = compute()
    recorder.recording.result = recorder.reference(result)
    return recorder.recording


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, inputs: Mapping[str, torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recording = Recording()
        # All tensors of the pass live until it is recorded, so that none has the place of another.
        self._kept: list[Any] = []
        self._known: dict[int, OutputOf | InputOf] = {}
        self._late: set[int] = set()
        self._num_operations = 0
        # Addresses in order, and which memory begins there.
        self._addresses: list[int] = []
        self._order: list[int] = []
        for name, tensor in inputs.items():
            self._keep(tensor, InputOf(name))

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if _reads(func, args):
            raise NotAProgramError("the model's code looks at a number of the pass")
        if func in _FACTORIES:
            return self._made(func(*args, **kwargs))
        given = list(_tensors((args, kwargs)))
        of_kernels = [self._is_made(each) for each in given]
        if any(of_kernels) and _writes(func):
            raise NotAProgramError(f"{func} changes what a kernel computed")
        if any(of_kernels) and not self.recording.after:
            native = as_native(func, args, kwargs)
            if native is not None:
                self._made(native.out)
                native.function(native.fields)
                return native.out
        result = func(*args, **kwargs)
        if any(of_kernels) and all(self._is_made(each) for each in _tensors(result)):
            return result  # a view
        if func in _CONVERSIONS and result is given[0]:
            return result
        self._note_operation(func, args, kwargs, result)
        return result

    def note(self, function: NativeFunction, fields: bytes) -> None:
        """Note a call of a kernel."""
        if self.recording.after:
            late = next(iter(self.recording.after.values())).function
            raise NotAProgramError(f"{late} stands between kernels")
        numbers = np.frombuffer(fields, dtype=np.int64).copy()
        storages = np.array([self._memory_at(int(each)) for each in numbers], dtype=np.int64)
        self.recording.calls.append(KernelCall(function, numbers, storages))

    def reference(self, value: Any) -> Any:
        """Return how a tensor is found again; anything else, and constants, as they are."""
        if isinstance(value, list | tuple):
            return type(value)(map(self.reference, value))
        if not isinstance(value, torch.Tensor):
            return value
        known = self._known.get(id(value))
        if known is not None:
            return known
        if not self._is_made(value):
            return value
        memory = self._memory_at(_address(value))
        shape, strides = tuple(value.shape), value.stride()
        return Place(memory, int(value.storage_offset()), value.dtype, shape, strides)

    def _note_operation(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        number = self._num_operations
        self._num_operations += 1
        given = list(_tensors((args, kwargs)))
        is_late = any(id(each) in self._late or self._is_made(each) for each in given)
        if _writes(func) and not all(id(each) in self._known for each in given[:1]):
            raise NotAProgramError(f"{func} changes a tensor of the model")
        kept = {name: self.reference(value) for name, value in kwargs.items()}
        operation = Operation(func, self.reference(tuple(args)), kept)
        (self.recording.after if is_late else self.recording.before)[number] = operation
        for index, tensor in enumerate(_tensors(result)):
            if is_late:
                self._late.add(id(tensor))
            if id(tensor) not in self._known:
                self._keep(tensor, OutputOf(number, index))

    def _made(self, tensor: torch.Tensor) -> torch.Tensor:
        self._kept.append(tensor)
        self._add_memory(tensor, None)
        return tensor

    def _keep(self, tensor: torch.Tensor, origin: OutputOf | InputOf) -> None:
        self._kept.append(tensor)
        self._known[id(tensor)] = origin
        # A view of what is known, or of the model's own, is found through that.
        if tensor.untyped_storage().nbytes() and self._memory_at(_address(tensor)) < 0:
            self._add_memory(tensor, origin)

    def _add_memory(self, tensor: torch.Tensor, origin: OutputOf | InputOf | None) -> None:
        address, nbytes = _address(tensor), tensor.untyped_storage().nbytes()
        at = bisect.bisect(self._addresses, address)
        self._addresses.insert(at, address)
        self._order.insert(at, len(self.recording.memories))
        self.recording.memories.append(Memory(address, nbytes, origin))

    def _memory_at(self, address: int) -> int:
        """Return which memory of the pass an address lies in; -1: none."""
        at = bisect.bisect(self._addresses, address) - 1
        if at < 0:
            return -1
        memory = self.recording.memories[self._order[at]]
        return self._order[at] if address < memory.address + memory.nbytes else -1

    def _is_made(self, tensor: torch.Tensor) -> bool:
        memory = self._memory_at(_address(tensor))
        return memory >= 0 and self.recording.memories[memory].origin is None


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    return (each for each in tree_leaves(values) if isinstance(each, torch.Tensor))


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _reads(func: Any, args: tuple[Any, ...]) -> bool:
    """Return whether what comes of it, but for its numbers, depends on numbers."""
    if func is _aten.index.Tensor:
        return any(each.dtype in (torch.bool, torch.uint8) for each in _tensors(args[1]))
    return func in _READS or bool(_READING_TAGS.intersection(func.tags))


def outputs_in(value: Any) -> Iterator[int]:
    """Yield the operations of torch whose outputs a reference, or some of them, stand for."""
    if isinstance(value, OutputOf):
        yield value.operation
    elif isinstance(value, list | tuple):
        for each in value:
            yield from outputs_in(each)


def is_changing(operation: Operation) -> bool:
    """Return whether an operation changes what it is given."""
    return _writes(operation.function)


def _writes(func: Any) -> bool:
    return any(each.alias_info and each.alias_info.is_write for each in func._schema.arguments)
