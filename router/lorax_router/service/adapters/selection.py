"""From the adapter fields of a request to the adapter it wants; checked, nothing asked for yet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from lorax_contract.adapters import (
    ALIAS_SOURCE,
    SOURCES,
    TOKEN_SOURCES,
    AdapterRef,
    AdapterUnavailableError,
    Combination,
    MajoritySign,
    MergeSpec,
    key_of,
)
from lorax_contract.errors import ValidationError
from lorax_router.service.adapters.aliases import AliasBook
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
    # Names that win over ids, where a request names no source.
    aliases: AliasBook = field(default_factory=AliasBook)

    def selection_of(
        self, params: GenerateParameters, adapter_id: str | None = None
    ) -> AdapterSelection | None:
        """Return the adapter that a request wants, None for the base model.

        ``adapter_id`` is named in place of the parameters' own. Raises ValidationError for what
        cannot be a name or contradicts itself.
        """
        if adapter_id is None:
            adapter_id = params.adapter_id
        _check_names(params, adapter_id)
        merged = params.merged_adapters
        named = adapter_id not in (None, "", BASE_MODEL_ADAPTER_ID)
        if not named and merged is None:
            return self.static
        if named and merged is not None:
            raise ValidationError("`adapter_id` and `merged_adapters` exclude each other")
        if self.refusal is not None:
            raise ValidationError(
                f"`{'adapter_id' if named else 'merged_adapters'}`: {self.refusal}"
            )
        source = params.adapter_source or None
        known = (*SOURCES, ALIAS_SOURCE)
        if source not in (None, *known):
            raise ValidationError(
                f"`adapter_source` {source!r} is not known; choose one of {', '.join(known)}"
            )
        if merged is not None:
            refs = tuple(self._ref(source, name) for name in _checked(merged))
        else:
            refs = (self._ref(source, adapter_id or "", params.revision),)
        # A source that takes no token is not told it: whoever asks, it is one question.
        takes_token = any(ref.source in TOKEN_SOURCES for ref in refs)
        return AdapterSelection(
            refs=refs,
            merge=None if merged is None else _merge_spec(merged),
            token=params.api_token if takes_token else None,
        )

    def _ref(self, source: str | None, name: str, revision: str | None = None) -> AdapterRef:
        if source is None:
            is_alias = revision is None and self.aliases.find(name) is not None
            source = ALIAS_SOURCE if is_alias else self.default_source
        if source == ALIAS_SOURCE and revision is not None:
            raise ValidationError(f"{name!r} is an alias, which has no revisions")
        try:
            return AdapterRef.of(source, name, revision)
        except AdapterUnavailableError as error:
            raise ValidationError(error.text) from error


def place_key(selection: AdapterSelection, stands_for: Callable[[str], str | None]) -> str:
    """Return what an adapter is called where requests are sent to places by it.

    Names that stand for one adapter have one key; a merge's tells its weights and way, too.

    Args:
        selection: the adapter, by whichever names.
        stands_for: returns the key of what a name of the operator's stands for, None if not known.
    """
    keys = [
        (stands_for(ref.id) if ref.source == ALIAS_SOURCE else None) or str(ref.plain)
        for ref in selection.refs
    ]
    if selection.merge is None:
        return keys[0]
    return f"merged:{key_of(*keys, *selection.merge.words)}"


def _checked(merged: MergedAdapters) -> list[str]:
    """Return the ids of a merge, of which there are as many as weights."""
    num = len(merged.ids)
    if not 1 <= num <= _MAX_MERGED:
        raise ValidationError(f"`merged_adapters.ids` takes 1 to {_MAX_MERGED} adapters, got {num}")
    if len(merged.weights) != num:
        raise ValidationError(
            f"`merged_adapters.weights` needs one weight for each of the {num} ids, "
            f"got {len(merged.weights)}"
        )
    return merged.ids


def _merge_spec(merged: MergedAdapters) -> MergeSpec:
    return MergeSpec(
        weights=tuple(merged.weights),
        combination=_one_of(Combination, "merge_strategy", merged.merge_strategy or "linear"),
        density=merged.density,
        majority_sign=_one_of(
            MajoritySign, "majority_sign_method", merged.majority_sign_method or "total"
        ),
    )


def _one_of(choices: type[Choice], field: str, word: str) -> Choice:
    try:
        return choices(word)
    except ValueError:
        known = ", ".join(str(each.value) for each in choices)
        raise ValidationError(
            f"`merged_adapters.{field}` {word!r} is not known; choose one of {known}"
        ) from None


def _check_names(params: GenerateParameters, adapter_id: str | None) -> None:
    """W2: a control character in a name must not reach a header or a log line."""
    merged = params.merged_adapters
    names = [
        ("adapter_id", adapter_id),
        ("adapter_source", params.adapter_source),
        ("revision", params.revision),
    ]
    if merged is not None:
        names += [("merged_adapters.ids", each) for each in merged.ids]
    for place, name in names:
        if name is not None and has_control_characters(name):
            raise ValidationError(f"`{place}` must not contain control characters")


def has_control_characters(text: str) -> bool:
    """Whether a text has characters that could end a header or a log line (C0, DEL, C1)."""
    # All of them are among those that cannot be printed: most names are looked through at once.
    return not text.isprintable() and any(char < " " or "\x7f" <= char <= "\x9f" for char in text)
