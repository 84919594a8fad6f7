"""Adapters as mlx-lm saves them, in the terms of PEFT's.

A linear of mlx-lm computes, with its own weight W and bias::

    lora    y = x W^T + bias + scale * (x lora_a) lora_b
    dora    y = m / ||W + scale * (lora_a lora_b)^T||_row
                * (x W^T + scale * (x lora_a) lora_b) + bias

so its factors are PEFT's, transposed, and ``scale`` is what PEFT makes of alpha and rank. An
embedding's row t gains ``scale * lora_a[t] lora_b``. The head of a model without a head of its
own is the embedding, low-rank part and all, which PEFT's is not: there the head gets the two
factors in exchanged roles.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lorax_shard.adapter_files import MLX_WEIGHTS_FILE
from lorax_shard.peft.base import BaseDescription
from lorax_shard.peft.config import LoraOptions, finite_number
from lorax_shard.peft.errors import AdapterRefusedError, listing, shorten
from lorax_shard.peft.files import TensorInfo
from lorax_shard.peft.keys import KeyPart
from lorax_shard.peft.targets import LowRank, Selection

_PARTS = ("lora_a", "lora_b", "m")
_TYPES = ("lora", "dora")
_ADVICE = "mlx_lm.fuse makes a model of it that can be served as it is"


@dataclass(frozen=True, slots=True, kw_only=True)
class MlxAdapter:
    """What an adapter of mlx-lm is in PEFT's terms."""

    options: LoraOptions
    selection: Selection
    parts: Mapping[str, Mapping[KeyPart, str]]
    # Of the converted tensors.
    infos: Mapping[str, TensorInfo]

    def convert(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the converted tensors of those in the file."""
        return {
            name: tensors[name.removesuffix(_TURNED)].T if name.endswith(_TURNED) else tensors[name]
            for name in self.infos
        }


# Marks the name of a tensor that is the transposed one of the file.
_TURNED = " (transposed)"


def is_mlx(document: Mapping[str, Any], weights: str) -> bool:
    """Tell whether mlx-lm is meant by a configuration beside weights in a file of this name."""
    says_so = "lora_parameters" in document or "fine_tune_type" in document
    # Some tools write both vocabularies into one configuration.
    return says_so and ("peft_type" not in document or weights == MLX_WEIGHTS_FILE)


def read_mlx(
    document: Mapping[str, Any], infos: Mapping[str, TensorInfo], base: BaseDescription
) -> MlxAdapter:
    """Return the adapter of a configuration and a file's tensors; raises AdapterRefusedError."""
    return _MlxReader(document, infos, base).read()


class _MlxReader:
    """Takes the values of one configuration and one file, checking each."""

    def __init__(
        self, document: Mapping[str, Any], infos: Mapping[str, TensorInfo], base: BaseDescription
    ) -> None:
        self._document = document
        self._infos = infos
        self._base = base
        kind = document.get("fine_tune_type", "lora")
        if kind not in _TYPES:
            raise AdapterRefusedError(
                f"fine_tune_type {shorten(kind)} of mlx-lm is not supported: only lora and dora "
                f"are adapters; {_ADVICE}"
            )
        self._is_dora = kind == "dora"
        parameters = document.get("lora_parameters")
        if not isinstance(parameters, dict):
            raise AdapterRefusedError(
                "lora_parameters is missing in adapter_config.json, which mlx-lm wrote; it must "
                "have rank and scale"
            )
        self._parameters = parameters

    def read(self) -> MlxAdapter:
        """Return the adapter; raises AdapterRefusedError."""
        low_rank = LowRank(self._rank(), self._scale())
        modules = self._modules()
        self._check_places(list(modules))
        parts: dict[str, Mapping[KeyPart, str]] = {}
        infos: dict[str, TensorInfo] = {}
        for name, keys in modules.items():
            for each, own in self._converted(name, keys).items():
                parts[each] = own
                infos |= {key: self._info(key) for key in own.values()}
        warnings = ("the scale is 0: it adds nothing",) if low_rank.scaling == 0 else ()
        return MlxAdapter(
            options=self._options(low_rank, tuple(parts)),
            selection=Selection(
                low_rank=dict.fromkeys(parts, low_rank), saved={}, tokens={}, warnings=warnings
            ),
            parts=parts,
            infos=infos,
        )

    def _rank(self) -> int:
        rank = self._parameters.get("rank")
        if type(rank) is not int or rank < 1:
            raise _wrong("rank", rank, "a positive whole number")
        return rank

    def _scale(self) -> float:
        scale = finite_number("lora_parameters.scale", self._parameters.get("scale"))
        alpha = self._parameters.get("alpha")
        if alpha is not None and alpha != self._parameters["rank"]:
            # The first releases multiplied by alpha / rank, the later ones do not look at it.
            raise AdapterRefusedError(
                "lora_parameters has an alpha, which releases of mlx-lm understand differently; "
                "take it out of adapter_config.json and write the whole factor as scale "
                "(where alpha counted: scale * alpha / rank)"
            )
        return scale

    def _modules(self) -> dict[str, dict[str, str]]:
        """Return the keys by module and part."""
        found: dict[str, dict[str, str]] = {}
        unknown = []
        for key in self._infos:
            module, _, part = key.rpartition(".")
            if not module or part not in _PARTS or (part == "m") > self._is_dora:
                unknown.append(key)
            found.setdefault(module, {})[part] = key
        if unknown or not found:
            raise AdapterRefusedError(
                f"it is an adapter of mlx-lm with tensors other than lora_a, lora_b"
                f"{' and m' if self._is_dora else ''}: {listing(unknown) or 'none at all'}; "
                f"{_ADVICE}"
            )
        experts = [module for module, keys in found.items() if self._has_experts(keys)]
        if experts:
            raise AdapterRefusedError(
                f"it has weights for {listing(experts)}, parts of MoE experts; only linears that "
                f"compute every token can be adapted; {_ADVICE}"
            )
        return found

    def _has_experts(self, keys: Mapping[str, str]) -> bool:
        return any(len(self._infos[key].shape) > 2 for key in keys.values())

    def _check_places(self, modules: list[str]) -> None:
        """Refuse weights that mlx-lm would not load, for layers or modules that it leaves out."""
        keys = self._parameters.get("keys")
        strangers = []
        for name in modules:
            layer, inner = _in_layer(name)
            if (isinstance(keys, list) and name not in keys and inner not in keys) or (
                layer is not None and layer[1] < self._first_layer(layer[0])
            ):
                strangers.append(name)
        if strangers:
            raise AdapterRefusedError(
                f"it has weights for {listing(strangers)}, which its num_layers and keys leave "
                "out: mlx-lm would not load them; correct adapter_config.json"
            )

    def _first_layer(self, prefix: str) -> int:
        num_layers = self._document.get("num_layers", self._document.get("lora_layers", -1))
        if type(num_layers) is not int:
            raise _wrong("num_layers", num_layers, "a whole number")
        places = (_in_layer(name)[0] for name in self._base.modules)
        count = max((at[1] + 1 for at in places if at is not None and at[0] == prefix), default=0)
        return max(0, count - num_layers) if num_layers > 0 else 0

    def _converted(self, name: str, keys: Mapping[str, str]) -> dict[str, dict[KeyPart, str]]:
        """Return the parts of a module, and of a head that shares its weight, by name."""
        base = self._base
        turned = {part: f"{key}{_TURNED}" for part, key in keys.items()}
        info = base.modules.get(name)
        if info is None or info.kind != "embedding":
            own = {"lora_a": KeyPart.A, "lora_b": KeyPart.B}
            parts = {part: turned[each] for each, part in own.items() if each in turned}
            if "m" in keys:
                parts[KeyPart.MAGNITUDE] = keys["m"]
            if base.tied_with(name):
                raise AdapterRefusedError(
                    f"it has weights for {name}, which shares those of {base.input_embedding} "
                    "here; it was made for a model with a head of its own"
                )
            return {name: parts}
        if self._is_dora:
            raise AdapterRefusedError(
                f"it adapts {name} by DoRA, which mlx-lm computes by rows and PEFT by columns; "
                f"{_ADVICE}"
            )
        own = {"lora_a": KeyPart.EMBEDDING_A, "lora_b": KeyPart.EMBEDDING_B}
        parts = {part: turned[each] for each, part in own.items() if each in turned}
        as_head = {"lora_a": KeyPart.B, "lora_b": KeyPart.A}
        head = {part: keys[each] for each, part in as_head.items() if each in keys}
        return {name: parts, **dict.fromkeys(base.tied_with(name), head)}

    def _info(self, name: str) -> TensorInfo:
        info = self._infos[name.removesuffix(_TURNED)]
        return TensorInfo(info.dtype, info.shape[::-1]) if name.endswith(_TURNED) else info

    def _options(self, low_rank: LowRank, modules: tuple[str, ...]) -> LoraOptions:
        trained_on = self._document.get("model")
        return LoraOptions(
            rank=low_rank.rank,
            alpha=low_rank.scaling * low_rank.rank,
            use_rslora=False,
            use_dora=self._is_dora,
            lora_bias=False,
            bias="none",
            rank_pattern={},
            alpha_pattern={},
            target_modules=modules,
            exclude_modules=(),
            layers_to_transform=None,
            layers_pattern=(),
            modules_to_save=(),
            token_indices={},
            ensure_weight_tying=False,
            trained_class="",
            trained_on=trained_on if isinstance(trained_on, str) else "",
        )


def _in_layer(name: str) -> tuple[tuple[str, int] | None, str]:
    """Return the list of layers, the number in it and the name within; None: not in a layer."""
    parts = name.split(".")
    for at, part in enumerate(parts):
        if part.isdecimal():
            return (".".join(parts[:at]), int(part)), ".".join(parts[at + 1 :])
    return None, name


def _wrong(name: str, value: Any, wanted: str) -> AdapterRefusedError:
    return AdapterRefusedError(
        f"{name} of adapter_config.json, which mlx-lm wrote, is {shorten(value)}; "
        f"it must be {wanted}"
    )
