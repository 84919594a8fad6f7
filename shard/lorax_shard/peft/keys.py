"""The names of tensors in PEFT's files: which module, which part of its change."""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable, Mapping

from lorax_shard.peft.errors import AdapterRefusedError, listing, shorten

_PREFIX = "base_model.model."


class KeyPart(enum.Enum):
    """What a tensor is to its module."""

    A = "a"
    B = "b"
    # The same of an embedding, which PEFT names and lays out otherwise.
    EMBEDDING_A = "embedding_a"
    EMBEDDING_B = "embedding_b"
    B_BIAS = "b_bias"
    MAGNITUDE = "magnitude"
    # The module's own weight or bias, below a wrapper or plain.
    BASE_WEIGHT = "base_weight"
    BASE_BIAS = "base_bias"
    WEIGHT = "weight"
    BIAS = "bias"
    ROWS = "token_rows"
    # Saved with the adapter, without influence on what it computes.
    UNUSED = "unused"


# The key of each part, by module.
Parts = Mapping[str, Mapping[KeyPart, str]]

# Endings of names, the longest first. Releases differ in whether the adapter's name is kept.
_ENDINGS = (
    (r"lora_A(?:\.default)?\.weight", KeyPart.A),
    (r"lora_B(?:\.default)?\.weight", KeyPart.B),
    (r"lora_B(?:\.default)?\.bias", KeyPart.B_BIAS),
    (r"lora_embedding_A(?:\.default)?", KeyPart.EMBEDDING_A),
    (r"lora_embedding_B(?:\.default)?", KeyPart.EMBEDDING_B),
    (r"lora_magnitude_vector(?:\.default)?(?:\.weight)?", KeyPart.MAGNITUDE),
    (r"lora_velora_embed(?:\.default)?", KeyPart.UNUSED),
    (r"token_adapter\.trainable_tokens_delta(?:\.default)?", KeyPart.ROWS),
    (r"(?:token_adapter\.)?base_layer\.weight", KeyPart.BASE_WEIGHT),
    (r"(?:token_adapter\.)?base_layer\.bias", KeyPart.BASE_BIAS),
    # Beside the plain name, under which PEFT finds the weights of modules_to_save, it leaves
    # copies in the file when the vocabulary was changed.
    (r"(?:modules_to_save(?:\.default)?|original_module)\.(?:weight|bias)", KeyPart.UNUSED),
    (r"weight", KeyPart.WEIGHT),
    (r"bias", KeyPart.BIAS),
)
_PATTERNS = tuple((re.compile(rf"(.+?)\.{ending}"), part) for ending, part in _ENDINGS)


def by_module(keys: Iterable[str]) -> dict[str, dict[KeyPart, str]]:
    """Return the key of each part of each module; raises AdapterRefusedError."""
    found: dict[str, dict[KeyPart, str]] = {}
    unknown: list[str] = []
    for key in keys:
        parsed = parse_key(key)
        if parsed is None:
            unknown.append(key)
            continue
        module, part = parsed
        if part in found.setdefault(module, {}) and part is not KeyPart.UNUSED:
            raise AdapterRefusedError(f"tensor {shorten(key)} is there twice, under another name")
        found[module][part] = key
    if unknown and not found:
        raise AdapterRefusedError(
            f"none of its {len(unknown)} tensors has a name that PEFT gives: those begin with "
            f"{_PREFIX} and end like .lora_A.weight; it has {listing(unknown)}"
        )
    if unknown:
        raise AdapterRefusedError(
            f"the weights hold tensors whose names this server does not know: {listing(unknown)}"
        )
    return found


def parse_key(key: str) -> tuple[str, KeyPart] | None:
    """Return module and part of a tensor's name; None: no name that PEFT gives."""
    if not key.startswith(_PREFIX):
        return None
    name = key.removeprefix(_PREFIX)
    for pattern, part in _PATTERNS:
        match = pattern.fullmatch(name)
        if match is not None:
            return match[1], part
    return None
