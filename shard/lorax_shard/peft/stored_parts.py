"""The parts of modules, read from a file to where they stay, while their digest takes them in.

Most are read as they are. The factors of all experts come to lie as steps read them, an expert's A and
B' side by side, so that nobody copies gigabytes again: where the file has them otherwise, as PEFT
has B of all experts, they are turned over in memory that is used again for the next ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch

from lorax_shard.giving_way import PIECE_BYTES, rest
from lorax_shard.hashing import bytes_of, take
from lorax_shard.huge_pages import map_memory
from lorax_shard.lora.arena import side_by_side
from lorax_shard.lora.delta import ModuleDelta
from lorax_shard.peft.digest import TENSOR_PARTS, ContentDigest, Order, in_order
from lorax_shard.peft.tensor_file import StoredTensor, TensorFile, num_elements

# The document holds these: the configuration had them, the file of tensors has not.
IDS = "token_ids"
_EXPERTS_DIM = 3
# So many elements are turned over at once: they fit a core's own cache, and one thread does it.
_TURNED_AT_ONCE = 1 << 14


@dataclass(frozen=True, slots=True)
class StoredPlace:
    """Where a document says that a part lies: a tensor of the file, seen in another shape."""

    name: str
    # With the dimensions in the order in which they lie in the file; None: those of the file.
    shape: tuple[int, ...] | None = None
    order: Order | None = None

    @classmethod
    def from_json(cls, document: Any) -> Self:
        """Read what ``to_json`` returned; raises KeyError, TypeError or ValueError."""
        if isinstance(document, str):
            return cls(document)
        name, shape, order = document["name"], tuple(document["shape"]), document["order"]
        return cls(name, shape, None if order is None else tuple(order))

    def to_json(self) -> Any:
        """Return a name where that says all."""
        return self.name if self.shape is None else dataclasses.asdict(self)


class PartsReader:
    """Reads the modules of one adapter, in the order of its digest.

    Raises what ``TensorFile`` does for documents and files that are damaged.
    """

    def __init__(self, file: TensorFile, digest: ContentDigest) -> None:
        self._file, self._digest = file, digest
        # What modules share is one object again.
        self._read: dict[StoredPlace, torch.Tensor] = {}
        self._spare = [torch.empty(0, dtype=torch.uint8)] * 2

    def delta(self, name: str, entry: Mapping[str, Any]) -> ModuleDelta:
        """Return the change of a module, as its entry of the document says."""
        places = {part: StoredPlace.from_json(each) for part, each in entry["tensors"].items()}
        self._digest.begin_module(name, entry["scaling"])
        parts = self._side_by_side(places)
        # Parts that are unknown raise, like missing tensors: nothing is dropped silently.
        for part in sorted({*places, *entry.keys() & {IDS}}, key=TENSOR_PARTS.index):
            if part == IDS:
                parts[part] = self._ids(entry[part])
            elif part in parts:
                self._fill(part, places[part], parts[part])
            else:
                parts[part] = self._plain(part, places[part])
        return ModuleDelta(scaling=entry["scaling"], **parts)

    def _ids(self, ids: list[int]) -> torch.Tensor:
        tensor = torch.tensor(ids, dtype=torch.int64)
        self._digest.begin_part(IDS, tensor.dtype, tensor.shape, None)
        self._digest.hashed.update(bytes_of(tensor))
        return tensor

    def _plain(self, part: str, place: StoredPlace) -> torch.Tensor:
        """Return a tensor as it lies in the file, in memory of its own."""
        stored, shape = self._found(place)
        self._begin(part, place, stored, shape)
        if place in self._read:
            tensor = self._read[place]
            take(self._digest.hashed, bytes_of(in_order(tensor, place.order)))
            return tensor
        tensor = torch.empty(shape, dtype=stored.dtype)
        self._take(stored.start, _raw(tensor))
        tensor = tensor if place.order is None else tensor.permute(_inverse(place.order))
        return self._read.setdefault(place, tensor)

    def _side_by_side(self, places: Mapping[str, StoredPlace]) -> dict[str, torch.Tensor]:
        """Return memory for A and B of all experts, E x r x in and E x out x r; nothing for others."""
        if "a" not in places or "b" not in places:
            return {}
        (a, shape_a), (b, shape_b) = (self._found(places[part]) for part in ("a", "b"))
        is_of_experts = len(shape_a) == len(shape_b) == _EXPERTS_DIM
        if not is_of_experts or a.dtype != b.dtype or 0 in shape_a + shape_b:
            return {}
        (num, rank, width_in), (num_b, width_out, rank_b) = (
            _logical(shape, places[part].order) for part, shape in (("a", shape_a), ("b", shape_b))
        )
        if (num, rank) != (num_b, rank_b):
            raise ValueError("A and B are not of the same experts and ranks")
        of_a, of_b = side_by_side(num, (rank, width_in), (rank, width_out), a.dtype)
        return {"a": of_a, "b": of_b.mT}

    def _fill(self, part: str, place: StoredPlace, target: torch.Tensor) -> None:
        """Read the factors of all experts to where each one's lie without gaps, B by its columns."""
        stored, shape = self._found(place)
        self._begin(part, place, stored, shape)
        order = place.order or tuple(range(_EXPERTS_DIM))
        if part == "b":
            target = target.mT
            order = tuple((0, 2, 1)[dim] for dim in order)
        if order == (0, 1, 2):
            size = target[0].nbytes
            for number, each in enumerate(target):
                self._take(stored.start + number * size, _raw(each))
            return
        whole = self._spare_memory(0, stored.nbytes).view(stored.dtype).view(shape)
        self._take(stored.start, _raw(whole))
        if order[-1] == 0:
            last = whole.view(-1, shape[-1])
            first = self._spare_memory(1, stored.nbytes).view(stored.dtype).view(len(last.T), -1)
            turn_over(last, first)
            whole, order = first.view(shape[-1], *shape[:-1]), (0, *order[:-1])
        for each, own in zip(target, whole.permute(_inverse(order)), strict=True):
            each.copy_(own)
            rest()

    def _found(self, place: StoredPlace) -> tuple[StoredTensor, tuple[int, ...]]:
        """Return where a tensor lies, and the shape that a place sees there."""
        stored = self._file.find(place.name)
        shape = stored.shape if place.shape is None else place.shape
        if num_elements(shape) * stored.dtype.itemsize != stored.nbytes:
            raise ValueError(f"{place.name} has another size than the document says")
        if place.order is not None and sorted(place.order) != list(range(len(shape))):
            raise ValueError(f"{place.name} has another order than the document says")
        return stored, shape

    def _begin(
        self, part: str, place: StoredPlace, stored: StoredTensor, shape: tuple[int, ...]
    ) -> None:
        self._digest.begin_part(part, stored.dtype, _logical(shape, place.order), place.order)

    def _take(self, start: int, target: memoryview) -> None:
        """Read bytes, and have them hashed while they are in the cache."""
        for done in range(0, len(target), PIECE_BYTES):
            piece = target[done : done + PIECE_BYTES]
            self._file.read(start + done, piece)
            self._digest.hashed.update(piece)
            rest()

    def _spare_memory(self, number: int, num_bytes: int) -> torch.Tensor:
        if len(self._spare[number]) < num_bytes:
            self._spare[number] = map_memory(num_bytes)
        return self._spare[number][:num_bytes]


def turn_over(last: torch.Tensor, first: torch.Tensor) -> None:
    """Copy n x experts into experts x n, by parts that one core's cache holds."""
    rows = max(1, _TURNED_AT_ONCE // last.shape[1])
    for start in range(0, len(last), rows):
        piece = last[start : start + rows]
        first[:, start : start + len(piece)] = piece.T.contiguous()
        rest()


def _raw(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a tensor without gaps, to be written."""
    return bytes_of(tensor.view(-1))


def _logical(shape: tuple[int, ...], order: Order | None) -> tuple[int, ...]:
    """Return the shape of a tensor whose dimensions lie in another order."""
    return shape if order is None else tuple(shape[order.index(dim)] for dim in range(len(order)))


def _inverse(order: Order) -> Order:
    return tuple(order.index(dim) for dim in range(len(order)))
