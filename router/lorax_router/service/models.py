"""What dialects call a model: the base, or an adapter on it. Its one way to an adapter is here.

A name is, in this order, one of the base's, an alias, a source and an id (``local:folder``,
``s3://bucket/prefix``), or an id of the default source. Nothing that is unknown is answered by
the base: ``ModelNotFoundError`` says so, in the same words for what does not exist and for what
the caller may not use. The two words that clients of TGI send for no name are the base's, too.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from lorax_contract.adapters import (
    ALIAS_SOURCE,
    AdapterRef,
    AdapterUnavailableError,
    Reason,
)
from lorax_contract.errors import AdapterNotLoadedError, ModelNotFoundError, ValidationError
from lorax_router.service.adapters.aliases import Alias
from lorax_router.service.adapters.catalog import AdapterSelection
from lorax_router.service.adapters.management import AdapterManager
from lorax_router.service.adapters.names import KnownName
from lorax_router.service.adapters.selection import SelectionPolicy
from lorax_router.service.callers import ANYBODY, Caller
from lorax_router.service.requests import BASE_MODEL_ADAPTER_ID, GenerateParameters

OWNER = "lorax-py"
# What clients of TGI send as the model where their user named none.
_UNNAMED = ("dummy", "tgi")
# Of a name that is not known, in the text that says so.
_MAX_SHOWN = 200
# There is no such adapter for this caller, and no later try of theirs would find one.
_ABSENT = (Reason.NOT_FOUND, Reason.NO_ACCESS, Reason.OFFLINE)


class AdapterFields(NamedTuple):
    """The fields of GenerateParameters that a model's name stands for."""

    adapter_id: str | None
    adapter_source: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """A model as lists show it."""

    # What requests can send as their model.
    id: str
    # Unix time at which the server came to know it.
    created: int
    # What it is: the base's id, or the adapter's at its source.
    root: str
    # The base that it is an adapter for; None: it is the base.
    parent: str | None
    # Tokens of a prompt and its output.
    max_model_len: int
    owned_by: str = OWNER


class Models:
    """Reads names and lists what can be named.

    Args:
        model_id: the base's own id.
        served_names: what else the base is called; the first is shown. None: its id.
        max_model_len: tokens of a prompt and its output.
        selections: what a name that is an adapter's leads to.
        adapters: which adapters are known; None: none are served.
    """

    def __init__(
        self,
        model_id: str,
        served_names: Sequence[str],
        max_model_len: int,
        selections: SelectionPolicy,
        adapters: AdapterManager | None = None,
    ) -> None:
        self._model_id = model_id
        self._served = tuple(dict.fromkeys(served_names or [model_id]))
        self._max_model_len = max_model_len
        self._selections = selections
        self._adapters = adapters
        self._created = int(time.time())

    @property
    def base(self) -> str:
        """What the base is called in answers."""
        return self._served[0]

    def resolve(self, model: str | None, adapter_source: str | None = None) -> AdapterFields:
        """Return what a request's model stands for; ``adapter_source``: the source it names.

        Nobody is asked yet: an adapter that its source does not have is found out by the
        request, within ``asked_for``. Raises ModelNotFoundError for what cannot be a model.
        """
        if not model or model in self._served or model in (self._model_id, BASE_MODEL_ADAPTER_ID):
            return AdapterFields(None, None)
        if adapter_source is None and self._is_unnamed(model):
            return AdapterFields(None, None)
        if self._selections.refusal is not None:
            raise _not_found(model)
        try:
            ref = self._ref(model, adapter_source and adapter_source.lower())
        except AdapterUnavailableError as error:
            raise _not_found(model) from error
        if ref.source == ALIAS_SOURCE and self._selections.aliases.find(ref.id) is None:
            raise _not_found(model)
        return AdapterFields(ref.spoken, ref.source)

    def shown(self, model: str | None) -> str:
        """Return what answers call the model that a request named."""
        if not model or model == BASE_MODEL_ADAPTER_ID or self._is_unnamed(model):
            return self.base
        return model

    @contextmanager
    def asked_for(self, model: str | None) -> Iterator[None]:
        """Around the request: what its source does not have for this caller is no model."""
        try:
            yield
        except AdapterUnavailableError as error:
            if error.reason in _ABSENT:
                raise _not_found(model or "") from error
            raise

    async def cards(self, token: str | None = None, caller: Caller = ANYBODY) -> list[ModelCard]:
        """Return the base by all its names, then the adapters that a caller may use."""
        aliases = sorted(self._selections.aliases, key=lambda each: each.name)
        aliases = [alias for alias in aliases if caller.sees(alias.ref)]
        known = [] if self._adapters is None else await self._adapters.pages.usable(token, caller)
        return [
            *(self._base_card(name) for name in self._served),
            *(self._alias_card(alias) for alias in aliases),
            *(self._adapter_card(name) for name in known),
        ]

    async def card(
        self, model: str, token: str | None = None, caller: Caller = ANYBODY
    ) -> ModelCard:
        """Return what is known of a model; ModelNotFoundError, also if it is hidden."""
        fields = self.resolve(model)
        if fields.adapter_id is None:
            return self._base_card(self.shown(model))
        if fields.adapter_source == ALIAS_SOURCE:
            if not caller.sees(AdapterRef(source=ALIAS_SOURCE, id=fields.adapter_id)):
                raise _not_found(model)
            alias = self._selections.aliases.find(fields.adapter_id)
            assert alias is not None
            return self._alias_card(alias)
        try:
            selection = self._selection(fields, token)
            assert self._adapters is not None
            return self._adapter_card(await self._adapters.known(selection, caller))
        except (AdapterNotLoadedError, ValidationError) as error:
            raise _not_found(model) from error

    def _is_unnamed(self, model: str) -> bool:
        is_name = model in self._served or self._selections.aliases.find(model) is not None
        return model in _UNNAMED and not is_name

    def _ref(self, model: str, source: str | None) -> AdapterRef:
        if source is not None:
            return AdapterRef.of(source, model.removeprefix(f"{source}:"))
        if self._selections.aliases.find(model) is not None:
            return AdapterRef.of(ALIAS_SOURCE, model)
        return AdapterRef.parse(model, self._selections.default_source)

    def _selection(self, fields: AdapterFields, token: str | None) -> AdapterSelection:
        params = GenerateParameters(
            adapter_id=fields.adapter_id, adapter_source=fields.adapter_source, api_token=token
        )
        selection = self._selections.selection_of(params)
        assert selection is not None
        return selection

    def _name_of(self, ref: AdapterRef) -> str:
        """Return the shortest name that leads to an adapter."""
        for name in (ref.spoken, str(ref)):
            found = self.resolve(name)
            if found == AdapterFields(ref.spoken, ref.source):
                return name
        return str(ref)

    def _base_card(self, name: str) -> ModelCard:
        return ModelCard(
            id=name, created=self._created, root=self._model_id, parent=None,
            max_model_len=self._max_model_len,
        )  # fmt: skip

    def _alias_card(self, alias: Alias) -> ModelCard:
        return self._card(alias.name, alias.target.refs[0], alias.created_at)

    def _adapter_card(self, name: KnownName) -> ModelCard:
        return self._card(self._name_of(name.ref), name.ref, name.first_seen_at)

    def _card(self, id: str, ref: AdapterRef, created: float) -> ModelCard:
        return ModelCard(
            id=id, created=int(created), root=ref.spoken, parent=self.base,
            max_model_len=self._max_model_len,
        )  # fmt: skip


def _not_found(model: str) -> ModelNotFoundError:
    name = model if len(model) <= _MAX_SHOWN else f"{model[:_MAX_SHOWN]}…"
    return ModelNotFoundError(
        f"there is no model {name!r} that this request may use; GET /v1/models lists what is known"
    )
