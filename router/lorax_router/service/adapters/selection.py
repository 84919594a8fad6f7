"""From the adapter fields of a request to the adapter it wants; checked, nothing asked for yet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from lorax_contract.adapters import (
    SOURCES,
    TOKEN_SOURCES,
    AdapterRef,
    AdapterUnavailableError,
    Combination,
    MajoritySign,
    MergeSpec,
)
from lorax_contract.errors import ValidationError
from lorax_router.service.adapters.catalog import AdapterSelection
from lorax_router.service.requests import (
    BASE_MODEL_ADAPTER_ID,
    GenerateParameters,
    MergedAdapters,
)

_MAX_MERGED = 16

Choice = TypeVar("Choice", Combination, MajoritySign)


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectionPolicy:
    """What the server has for adapters."""

    # Why no adapters are served; None: they are.
    refusal: str | None = None
    default_source: str = "hub"
    # What requests get that name no adapter; None: the base model.
    static: AdapterSelection | None = None

    def selection_of(self, params: GenerateParameters) -> AdapterSelection | None:
        """Return the adapter that a request wants, None for the base model.

        Raises ValidationError for what cannot be a name or contradicts itself.
        """
        _check_names(params)
        merged = params.merged_adapters
        named = params.adapter_id not in (None, "", BASE_MODEL_ADAPTER_ID)
        if not named and merged is None:
            return self.static
        if named and merged is not None:
            raise ValidationError("`adapter_id` and `merged_adapters` exclude each other")
        if self.refusal is not None:
            raise ValidationError(
                f"`{'adapter_id' if named else 'merged_adapters'}`: {self.refusal}"
            )
        source = params.adapter_source or self.default_source
        if source not in SOURCES:
            raise ValidationError(
                f"`adapter_source` {source!r} is not known; choose one of {', '.join(SOURCES)}"
            )
        # A source that takes no token is not told it: whoever asks, it is one question.
        token = params.api_token if source in TOKEN_SOURCES else None
        if merged is not None:
            return _merged(merged, source, token)
        ref = _ref(source, params.adapter_id or "", params.revision)
        return AdapterSelection(refs=(ref,), token=token)


def _ref(source: str, name: str, revision: str | None = None) -> AdapterRef:
    try:
        return AdapterRef.of(source, name, revision)
    except AdapterUnavailableError as error:
        raise ValidationError(error.text) from error


def _merged(merged: MergedAdapters, source: str, token: str | None) -> AdapterSelection:
    num = len(merged.ids)
    if not 1 <= num <= _MAX_MERGED:
        raise ValidationError(f"`merged_adapters.ids` takes 1 to {_MAX_MERGED} adapters, got {num}")
    if len(merged.weights) != num:
        raise ValidationError(
            f"`merged_adapters.weights` needs one weight for each of the {num} ids, "
            f"got {len(merged.weights)}"
        )
    spec = MergeSpec(
        weights=tuple(merged.weights),
        combination=_one_of(Combination, "merge_strategy", merged.merge_strategy or "linear"),
        density=merged.density,
        majority_sign=_one_of(
            MajoritySign, "majority_sign_method", merged.majority_sign_method or "total"
        ),
    )
    refs = tuple(_ref(source, name) for name in merged.ids)
    return AdapterSelection(refs=refs, merge=spec, token=token)


def _one_of(choices: type[Choice], field: str, word: str) -> Choice:
    try:
        return choices(word)
    except ValueError:
        known = ", ".join(str(each.value) for each in choices)
        raise ValidationError(
            f"`merged_adapters.{field}` {word!r} is not known; choose one of {known}"
        ) from None


def _check_names(params: GenerateParameters) -> None:
    """W2: a control character in a name must not reach a header or a log line."""
    merged = params.merged_adapters
    names = [
        ("adapter_id", params.adapter_id),
        ("adapter_source", params.adapter_source),
        ("revision", params.revision),
    ]
    if merged is not None:
        names += [("merged_adapters.ids", each) for each in merged.ids]
    for field, name in names:
        if name is not None and has_control_characters(name):
            raise ValidationError(f"`{field}` must not contain control characters")


def has_control_characters(text: str) -> bool:
    """Whether a text has characters that could end a header or a log line (C0, DEL, C1)."""
    return any(char < " " or "\x7f" <= char <= "\x9f" for char in text)
