"""From the folder that PEFT (or mlx-lm) saved to a HostAdapter: as PEFT would compute it, or refused.

Everything that can be known from sizes, names and shapes is checked before a tensor is
loaded. The tensors keep the types of the file; ``normal.cast`` makes those that PEFT computes with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from lorax_shard.adapter_files import CONFIG_FILE
from lorax_shard.giving_way import PIECE_BYTES, rest
from lorax_shard.hashing import tensor_digest
from lorax_shard.lora.delta import HostAdapter, ModuleDelta
from lorax_shard.peft.base import BaseDescription
from lorax_shard.peft.base_name import foreign_base
from lorax_shard.peft.config import LoraOptions, parse_config, parse_json
from lorax_shard.peft.digest import digest_adapter
from lorax_shard.peft.errors import AdapterRefusedError, listing, plain
from lorax_shard.peft.files import (
    AdapterLimits,
    TextFiles,
    find_text_files,
    read_header,
    require_files,
)
from lorax_shard.peft.keys import KeyPart, Parts, by_module
from lorax_shard.peft.labels import with_labels
from lorax_shard.peft.layouts import factors, under_parameters
from lorax_shard.peft.mlx import MlxAdapter, is_mlx, read_mlx
from lorax_shard.peft.older import OlderBase, older_base, present_base
from lorax_shard.peft.shapes import Checker, brings_base_weight
from lorax_shard.peft.targets import Selection, select
from lorax_shard.peft.tasks import SeenBase, refuse_headless, seen_base

Select = Callable[[LoraOptions, BaseDescription], Selection]


@dataclass(frozen=True, slots=True, kw_only=True)
class Examined:
    """An adapter as it was read, with its tokenizer and template files."""

    adapter: HostAdapter
    text: TextFiles
    # Those of its file that the adapter has as they are, by their names there.
    tensors: Mapping[str, torch.Tensor]
    # What somebody should know who wonders why it does not do what it was made for.
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Opened:
    """A folder whose configuration and header were read, before any tensor is."""

    path: Path
    options: LoraOptions
    selection: Selection
    # The base, as the adapters of its task see it, and as its time named it.
    seen: SeenBase
    older: OlderBase
    mlx: MlxAdapter | None = None


def read_adapter(folder: Path, base: BaseDescription, limits: AdapterLimits) -> HostAdapter:
    """Return the adapter in a folder that PEFT saved; raises AdapterRefusedError."""
    adapter = examine(folder, base, limits).adapter
    modules = {name: _dense(delta) for name, delta in adapter.modules.items()}
    return replace(adapter, modules=modules)


def _dense(delta: ModuleDelta) -> ModuleDelta:
    """Return a delta with the factors of experts as they lie in the normal form on disk."""
    if delta.a is None or delta.b is None or delta.a.dim() < len(("expert", "rank", "in")):
        return delta
    return replace(delta, a=delta.a.contiguous(), b=delta.b.contiguous())


def examine(
    folder: Path,
    base: BaseDescription,
    limits: AdapterLimits,
    *,
    select: Select = select,
    model_id: str = "",
) -> Examined:
    """Return the adapter and what it brings for tokens; raises AdapterRefusedError.

    ``select`` applies its patterns; ``model_id`` is what the base model is called.
    """
    opened = _opened(folder, base, limits, select)
    options, selection, seen, older = opened.options, opened.selection, opened.seen, opened.older
    whole, base = base, seen.base
    _check_ranks(selection, limits)
    vocab_size = Checker(options, selection, older.base, older.parts, older.infos).check()
    text = find_text_files(folder, limits)
    stored = _load(opened.path)
    tensors = stored if opened.mlx is None else opened.mlx.convert(stored)
    modules = Assembler(selection, older.base, older.parts, tensors).assemble()
    traits = frozenset({"rslora"} if options.use_rslora else ())
    adapter = HostAdapter(
        digest="", modules=modules, vocab_size=vocab_size, traits=traits,
        invocation_ids=options.invocation_ids,
    )  # fmt: skip
    adapter = older.served_by(adapter, limits)
    _check_range(adapter.modules, base)
    if options.invocation_ids:
        _check_activated(options.invocation_ids, adapter.modules, base)
    refuse_headless(adapter, base.scores)
    adapter = with_labels(seen.renamed(adapter), whole, folder, limits)
    return Examined(
        adapter=digest_adapter(adapter, text),
        text=text,
        tensors=stored if opened.mlx is None else {},
        warnings=(
            *selection.warnings,
            *foreign_base(options.trained_on, model_id),
            *_how_invoked(options.invocation_ids),
        ),
    )


def _opened(folder: Path, base: BaseDescription, limits: AdapterLimits, select: Select) -> _Opened:
    path = require_files(folder, limits)
    config = (folder / CONFIG_FILE).read_bytes()
    document = parse_json(config)
    if is_mlx(document, path.name):
        mlx = read_mlx(document, read_header(path, limits), base)
        return _Opened(
            path=path, options=mlx.options, selection=mlx.selection, seen=SeenBase(base, {}),
            older=present_base(base, mlx.parts, mlx.infos), mlx=mlx,
        )  # fmt: skip
    options = parse_config(config)
    seen = seen_base(base, options.task)
    _check_class(options, seen.base)
    infos = read_header(path, limits)
    older = older_base(seen.base, by_module(infos), infos, options)
    selection = select(options, older.base)
    older = replace(older, parts=under_parameters(older.parts, selection, older.base))
    return _Opened(path=path, options=options, selection=selection, seen=seen, older=older)


def _check_class(options: LoraOptions, base: BaseDescription) -> None:
    trained = options.trained_class
    if trained.endswith("ForCausalLM") and trained != base.architecture:
        raise AdapterRefusedError(
            f"the adapter was made for a {plain(trained)}; this server's base model is a "
            f"{base.architecture}"
        )


def _check_ranks(selection: Selection, limits: AdapterLimits) -> None:
    for name, chosen in selection.low_rank.items():
        if chosen.rank > limits.max_rank:
            raise AdapterRefusedError(
                f"{name} has the rank {chosen.rank}; the limit is {limits.max_rank}"
            )


def _load(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors, mapped from the file; raises AdapterRefusedError for NaN."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise AdapterRefusedError(f"{path.name} is damaged and cannot be read") from error
    broken = sorted(key for key, tensor in tensors.items() if not is_finite(tensor))
    if broken:
        raise AdapterRefusedError(f"weights are NaN or infinite in {listing(broken)}")
    return tensors


def is_finite(tensor: torch.Tensor) -> bool:
    """Return whether no value is NaN or infinite; both bounds are NaN where one value is.

    Twenty times as fast as to ask of each value.
    """
    for piece in torch.split(tensor.reshape(-1), PIECE_BYTES // tensor.itemsize):
        if piece.numel() and not all(bool(torch.isfinite(each)) for each in torch.aminmax(piece)):
            return False
        rest()
    return True


def _check_range(modules: Mapping[str, ModuleDelta], base: BaseDescription) -> None:
    """Refuse replacements of base values that the model's type can hold as infinity only."""
    largest = torch.finfo(getattr(torch, base.dtype)).max
    for name, delta in modules.items():
        for tensor in (delta.weight, delta.bias, delta.token_rows):
            if tensor is not None and tensor.numel() and tensor.abs().max() > largest:
                raise AdapterRefusedError(
                    f"weights for {name} are too large for the type that the model computes in "
                    f"({base.dtype})"
                )


def _how_invoked(ids: tuple[int, ...]) -> list[str]:
    if not ids:
        return []
    tokens = listing([str(each) for each in ids])
    text = (
        f"it acts from the last place in a prompt where the tokens {tokens} are "
        "(alora_invocation_tokens); without them the base model answers"
    )
    return [text]


def _check_activated(
    ids: tuple[int, ...], modules: Mapping[str, ModuleDelta], base: BaseDescription
) -> None:
    """Refuse what would change tokens before the invocation, or could never be invoked."""
    if max(ids) >= base.vocab_size:
        raise AdapterRefusedError(
            f"alora_invocation_tokens names token {max(ids)}; the base model has {base.vocab_size}"
        )
    for name, delta in modules.items():
        whole = (delta.weight, delta.bias, delta.token_rows)
        if any(part is not None for part in whole):
            raise AdapterRefusedError(
                f"the adapter has more than A and B for {name}, and this would act before its "
                "alora_invocation_tokens, too; train it without modules_to_save, "
                "trainable_token_indices and bias"
            )
        info = base.modules[name]
        if info.kind not in ("linear", "conv1d"):
            raise AdapterRefusedError(
                f"target_modules names {name}, a {info.type_name}, which alora_invocation_tokens "
                "excludes in PEFT; adapt linears"
            )


class Assembler:
    """Puts checked tensors together, module by module."""

    def __init__(
        self,
        selection: Selection,
        base: BaseDescription,
        parts: Parts,
        tensors: Mapping[str, torch.Tensor],
    ) -> None:
        self._selection = selection
        self._base = base
        self._parts = parts
        self._tensors = tensors
        self._is_base: dict[int, bool] = {}

    def assemble(self) -> dict[str, ModuleDelta]:
        """Return every module that the adapter changes, in the model's order."""
        self._check_tied()
        deltas = {name: self._delta(name) for name in self._base.modules}
        return {name: delta for name, delta in deltas.items() if delta is not None}

    def _tensor(self, name: str, *parts: KeyPart) -> torch.Tensor | None:
        """Return the first of the parts that the adapter has for a module."""
        keys = self._parts.get(name, {})
        return next((self._tensors[keys[part]] for part in parts if part in keys), None)

    def _delta(self, name: str) -> ModuleDelta | None:
        chosen = self._selection.low_rank.get(name)
        ids, _ = self._selection.tokens.get(name, ((), ""))
        down = self._tensor(name, KeyPart.A, KeyPart.EMBEDDING_A)
        up = self._tensor(name, KeyPart.B, KeyPart.EMBEDDING_B)
        if chosen is not None and down is not None and up is not None:
            down, up = factors(self._base.modules[name], chosen, down, up)
        delta = ModuleDelta(
            a=down,
            b=up,
            b_bias=self._tensor(name, KeyPart.B_BIAS),
            scaling=1.0 if chosen is None else chosen.scaling,
            magnitude=self._tensor(name, KeyPart.MAGNITUDE),
            bias=self._tensor(name, KeyPart.BIAS, KeyPart.BASE_BIAS),
            weight=self._weight(name),
            token_ids=torch.tensor(ids, dtype=torch.int64) if ids else None,
            token_rows=self._token_rows(name) if ids else None,
        )
        return delta if delta.nbytes else None

    def _weight(self, name: str) -> torch.Tensor | None:
        """Return the weight that replaces the base's; None where it is the base's."""
        weight = self._brought_weight(name)
        if weight is None or name not in self._base.weight_digests:
            return weight
        if id(weight) not in self._is_base:
            held = weight.to(getattr(torch, self._base.dtype))
            self._is_base[id(weight)] = tensor_digest(held) == self._base.weight_digests[name]
        return None if self._is_base[id(weight)] else weight

    def _brought_weight(self, name: str) -> torch.Tensor | None:
        """Return the weight that the adapter brings for a module, or for one tied to it."""
        own = self._tensor(name, KeyPart.WEIGHT, KeyPart.BASE_WEIGHT)
        if own is not None:
            return own
        for other in self._base.tied_with(name):
            if brings_base_weight(other, self._parts, self._selection):
                return self._tensor(other, KeyPart.WEIGHT, KeyPart.BASE_WEIGHT)
        return None

    def _token_rows(self, name: str) -> torch.Tensor | None:
        return self._tensor(self._selection.tokens[name][1] or name, KeyPart.ROWS)

    def _check_tied(self) -> None:
        """Refuse tensors that PEFT holds as one and that differ in the file."""
        for group in self._base.tied:
            weights = [
                self._tensor(name, KeyPart.WEIGHT, KeyPart.BASE_WEIGHT)
                for name in group
                if brings_base_weight(name, self._parts, self._selection)
            ]
            self._require_equal(weights, group)
        for name, source in self._selection.saved.items():
            if source:
                pair = [self._tensor(each, KeyPart.WEIGHT) for each in (source, name)]
                self._require_equal(pair, (source, name))
        for name, (_, source) in self._selection.tokens.items():
            if source:
                rows = [self._tensor(each, KeyPart.ROWS) for each in (source, name)]
                self._require_equal(rows, (source, name))
        for name, chosen in self._selection.low_rank.items():
            if chosen.tied_to:
                self._check_tied_low_rank(name, chosen.tied_to)

    def _check_tied_low_rank(self, head: str, embedding: str) -> None:
        for part, other in ((KeyPart.A, KeyPart.EMBEDDING_B), (KeyPart.B, KeyPart.EMBEDDING_A)):
            source = self._tensor(embedding, other)
            transposed = None if source is None else source.T
            self._require_equal([transposed, self._tensor(head, part)], (embedding, head))

    @staticmethod
    def _require_equal(tensors: list[torch.Tensor | None], names: tuple[str, ...]) -> None:
        present = [tensor for tensor in tensors if tensor is not None]
        if any(not torch.equal(present[0], other) for other in present[1:]):
            raise AdapterRefusedError(
                f"{listing(list(names))} share their weights in the base model, and the adapter "
                "has different ones for them"
            )
