"""Holds an adapter's tensors against its options and the base model, before any is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from lorax_shard.peft.base import BaseDescription, ModuleInfo
from lorax_shard.peft.config import LoraOptions
from lorax_shard.peft.errors import AdapterRefusedError, listing, plain
from lorax_shard.peft.files import TensorInfo
from lorax_shard.peft.keys import KeyPart, Parts
from lorax_shard.peft.layouts import stored_shapes
from lorax_shard.peft.targets import LowRank, Selection

# Parts of a name that are enough to know it again: a layer's number, a block, a linear.
_LEAST_SHARED = 3


class Checker:
    """Compares what is there with what must be there; raises AdapterRefusedError."""

    def __init__(
        self,
        options: LoraOptions,
        selection: Selection,
        base: BaseDescription,
        parts: Parts,
        infos: Mapping[str, TensorInfo],
    ) -> None:
        self._options = options
        self._selection = selection
        self._base = base
        self._parts = parts
        self._infos = infos
        self._vocabulary = {base.input_embedding, base.output_head} - {""}
        for name in tuple(self._vocabulary):
            self._vocabulary.update(base.tied_with(name))

    def check(self) -> int:
        """Check everything; return the rows of a vocabulary that the adapter enlarges, or 0."""
        self._check_presence()
        rows = self._grown_rows()
        for name, part, key in self._present():
            self._check_shape(name, part, key, rows)
        self._check_token_ids(rows)
        if rows:
            self._check_new_rows(rows)
        return rows

    def _present(self) -> Iterator[tuple[str, KeyPart, str]]:
        for name, parts in self._parts.items():
            for part, key in parts.items():
                yield name, part, key

    def _check_presence(self) -> None:
        strangers = [name for name in self._parts if name not in self._base.modules]
        experts = [name for name in strangers if "experts" in name.split(".")]
        if experts:
            raise AdapterRefusedError(
                f"it has weights for {listing(experts)}, parts of MoE experts that "
                "adapter_config.json does not name, or that this server's base model does not have"
            )
        if strangers:
            raise self._other_model(self._unknown(strangers))
        missing, extra = [], []
        for name, info in self._base.modules.items():
            present = set(self._parts.get(name, ()))
            self._refuse_biases(name, info, present)
            required, optional = self._expected(name, info)
            missing += [f"{name} ({part.value})" for part in sorted_parts(required - present)]
            extra += [self._parts[name][part] for part in present - required - optional]
        if missing:
            raise AdapterRefusedError(
                f"weights are missing that adapter_config.json asks for: {listing(missing)}"
            )
        if extra:
            raise AdapterRefusedError(
                f"the weights hold tensors that adapter_config.json does not ask for: "
                f"{listing(sorted(extra))}"
            )

    def _unknown(self, strangers: list[str]) -> str:
        """Say how names that the base does not have differ from the base's."""
        told = f"it has weights for {listing(strangers)}"
        expected = _nearest(strangers[0], self._base.modules)
        if not expected or len(strangers) < len(self._parts):
            return told
        return (
            f"none of the {len(strangers)} modules that it has weights for has a name of this "
            f"model: it says {plain(strangers[0])} where {expected} is expected"
        )

    def _refuse_biases(self, name: str, info: ModuleInfo, present: set[KeyPart]) -> None:
        if {KeyPart.BIAS, KeyPart.BASE_BIAS} & present and not info.replaceable:
            raise AdapterRefusedError(
                f"it brings a bias for {name}, a {info.type_name}; only biases of linears and "
                "norms are computed; train with bias='lora_only'"
            )

    @staticmethod
    def _refuse_embedding_bias(name: str, info: ModuleInfo) -> None:
        if info.kind == "embedding":
            raise AdapterRefusedError(
                f"lora_bias reaches {name}, an {info.type_name}; PEFT has it on linears only"
            )

    def _expected(self, name: str, info: ModuleInfo) -> tuple[set[KeyPart], set[KeyPart]]:
        """Return the parts that must be there for a module, and those that may be."""
        options, chosen = self._options, self._selection
        wrapped = {KeyPart.BASE_WEIGHT, KeyPart.BASE_BIAS} if info.replaceable else set()
        if name in chosen.low_rank:
            embedding = info.kind == "embedding" and not chosen.low_rank[name].of_parameter
            required = (
                {KeyPart.EMBEDDING_A, KeyPart.EMBEDDING_B} if embedding else {KeyPart.A, KeyPart.B}
            )
            if options.use_dora:
                required.add(KeyPart.MAGNITUDE)
            if options.lora_bias:
                self._refuse_embedding_bias(name, info)
                required.add(KeyPart.B_BIAS)
            if options.bias != "none" and info.has_bias:
                required.add(KeyPart.BASE_BIAS)
            return required, wrapped | {KeyPart.UNUSED}
        if name in chosen.saved:
            return {KeyPart.WEIGHT, KeyPart.BIAS} if info.has_bias else {KeyPart.WEIGHT}, {
                KeyPart.UNUSED
            }
        if name in chosen.tokens:
            return (set() if chosen.tokens[name][1] else {KeyPart.ROWS}), {KeyPart.ROWS, *wrapped}
        if options.bias == "all" and info.has_bias and info.replaceable:
            return {KeyPart.BIAS}, {KeyPart.WEIGHT} if name in self._vocabulary else set()
        # PEFT saves embedding and head as they are when their vocabulary was changed.
        return set(), {KeyPart.WEIGHT, KeyPart.BIAS} if name in self._vocabulary else set()

    def _grown_rows(self) -> int:
        """Return the rows of the vocabulary's modules where they are not the base's, or 0."""
        found = set()
        for name, part, key in self._present():
            axis = self._row_axis(name, part)
            shape = self._infos[key].shape
            if axis is not None and axis < len(shape) and shape[axis] != self._rows_of(name):
                found.add(shape[axis])
        if not found:
            return 0
        rows = min(found)
        if len(found) > 1 or rows < self._base.vocab_size:
            raise self._other_model(
                f"its vocabulary has {' and '.join(map(str, sorted(found)))} tokens where the "
                f"base has {self._base.vocab_size}"
            )
        return rows

    def _rows_of(self, name: str) -> int:
        info = self._base.modules[name]
        return info.in_features if info.kind == "embedding" else info.out_features

    def _row_axis(self, name: str, part: KeyPart) -> int | None:
        """Return which axis of a tensor counts the tokens of the vocabulary."""
        if name not in self._vocabulary:
            return None
        if part is KeyPart.EMBEDDING_A:
            return 1
        # B on an embedding: of target_parameters.
        if part in (KeyPart.WEIGHT, KeyPart.BASE_WEIGHT, KeyPart.B):
            return 0
        head = self._base.modules[name].kind == "linear"
        rows = (KeyPart.B_BIAS, KeyPart.BIAS, KeyPart.BASE_BIAS, KeyPart.MAGNITUDE)
        return 0 if head and part in rows else None

    def _check_shape(self, name: str, part: KeyPart, key: str, grown: int) -> None:
        shape = self._infos[key].shape
        wanted = self._wanted_shape(name, part)
        axis = self._row_axis(name, part)
        if wanted is not None and shape and self._is_own_output(name, part):
            # As many labels as it was trained for.
            wanted = (shape[0], *wanted[1:])
        if wanted is not None and grown and axis is not None:
            wanted = (*wanted[:axis], grown, *wanted[axis + 1 :])
        if wanted is None or shape == wanted:
            return
        ranks = {KeyPart.A: 0, KeyPart.EMBEDDING_A: 0, KeyPart.B: 1, KeyPart.EMBEDDING_B: 1}
        if len(shape) == 2 and part in ranks and shape[ranks[part]] != wanted[ranks[part]]:
            self._refuse_rank(name, key, (shape[ranks[part]], wanted[ranks[part]]))
        self._refuse_exchanged(name)
        raise self._other_model(f"{key} has the shape {list(shape)}, where {list(wanted)} fits")

    def _refuse_exchanged(self, name: str) -> None:
        """Refuse factors of experts in the layout of PEFT's first releases that had them."""
        info, chosen = self._base.modules[name], self._selection.low_rank.get(name)
        if info.kind != "experts" or chosen is None:
            return
        keys = self._parts[name]
        shapes = tuple(self._infos[keys[part]].shape for part in (KeyPart.A, KeyPart.B))
        if shapes == stored_shapes(replace(info, is_swapped=not info.is_swapped), chosen):
            raise AdapterRefusedError(
                f"{keys[KeyPart.A]} is laid out as earlier releases of PEFT did it, which took the "
                "outputs of experts for their inputs, and which PEFT reads no more; train it with a "
                "current release"
            )

    def _refuse_rank(self, name: str, key: str, ranks: tuple[int, int]) -> None:
        """Refuse a tensor whose rank is not the wanted one, unless the number of experts is not."""
        num_experts = self._base.modules[name].num_experts or 1
        if ranks[0] % num_experts == 0:
            raise AdapterRefusedError(
                f"{key} has the rank {ranks[0] // num_experts}; adapter_config.json says "
                f"{ranks[1] // num_experts} for {name}"
            )

    def _is_own_output(self, name: str, part: KeyPart) -> bool:
        """Whether a part belongs to the scores of a head that the adapter replaces."""
        head = self._base.scores
        is_replaced = name in self._selection.saved and part in (KeyPart.WEIGHT, KeyPart.BIAS)
        return head is not None and name == head.output and is_replaced

    def _wanted_shape(self, name: str, part: KeyPart) -> tuple[int, ...] | None:
        info = self._base.modules[name]
        chosen = self._selection.low_rank.get(name)
        rank = 0 if chosen is None else chosen.rank
        width = info.in_features if info.kind == "linear" else info.out_features
        down, up = stored_shapes(info, chosen or LowRank(0, 1.0))
        shapes: dict[KeyPart, tuple[int, ...]] = {
            KeyPart.A: down,
            KeyPart.B: up,
            KeyPart.EMBEDDING_A: (rank, info.in_features),
            KeyPart.EMBEDDING_B: (info.out_features, rank),
            KeyPart.B_BIAS: (info.out_features,),
            KeyPart.MAGNITUDE: (info.out_features,),
            KeyPart.WEIGHT: info.weight_shape,
            KeyPart.BASE_WEIGHT: info.weight_shape,
            KeyPart.BIAS: (info.out_features,),
            KeyPart.BASE_BIAS: (info.out_features,),
        }
        if part is KeyPart.ROWS:
            return len(self._selection.tokens[name][0]), width
        return shapes.get(part)

    def _check_token_ids(self, grown: int) -> None:
        for name, (ids, _) in self._selection.tokens.items():
            info = self._base.modules[name]
            if info.kind == "conv1d" or info.has_bias:
                # PEFT computes a head without its bias then, for all tokens.
                raise AdapterRefusedError(
                    f"trainable_token_indices reaches {name}, a {info.type_name}"
                    f"{' with a bias' if info.has_bias else ''}; only embeddings and heads "
                    "without a bias are computed"
                )
            rows = grown if grown and name in self._vocabulary else self._rows_of(name)
            if max(ids, default=-1) >= rows:
                raise AdapterRefusedError(
                    f"trainable_token_indices names token {max(ids)}; {name} has {rows} rows"
                )

    def _check_new_rows(self, rows: int) -> None:
        """Refuse added tokens whose embedding or output row nobody knows."""
        for name in (self._base.input_embedding, self._base.output_head):
            if name and not self._knows_new_rows(name):
                raise AdapterRefusedError(
                    f"it adds {rows - self._base.vocab_size} tokens, and the weights of {name} "
                    "for them are not in it; save it with save_embedding_layers=True"
                )

    def _knows_new_rows(self, name: str) -> bool:
        parts = self._parts.get(name, {})
        has_bias = self._base.modules[name].has_bias
        if has_bias and not {KeyPart.BIAS, KeyPart.BASE_BIAS} & set(parts):
            return False
        if {KeyPart.WEIGHT, KeyPart.BASE_WEIGHT} & set(parts):
            return True
        tied = self._base.tied_with(name)
        return any(brings_base_weight(each, self._parts, self._selection) for each in tied)

    def _other_model(self, what: str) -> AdapterRefusedError:
        return AdapterRefusedError(
            f"{what}; the adapter was made for another base model than this server's "
            f"({self._base.architecture})"
        )


def brings_base_weight(name: str, parts: Parts, selection: Selection) -> bool:
    """Return whether the adapter replaces the base's own weight of a module.

    That reaches the modules tied to it; a copy in modules_to_save does not.
    """
    present = parts.get(name, {})
    return KeyPart.BASE_WEIGHT in present or (
        KeyPart.WEIGHT in present and name not in selection.saved
    )


def _nearest(name: str, known: Iterable[str]) -> str:
    """Return the known name that ends most like a name; empty: none ends much like it."""
    parts = name.split(".")
    shared = {each: _shared_end(parts, each.split(".")) for each in known}
    best = max(shared, key=lambda each: shared[each], default="")
    return best if best and shared[best] >= _LEAST_SHARED else ""


def _shared_end(one: list[str], other: list[str]) -> int:
    pairs = zip(reversed(one), reversed(other), strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def sorted_parts(parts: set[KeyPart]) -> list[KeyPart]:
    """Return parts in the order of their names."""
    return sorted(parts, key=lambda part: part.value)
