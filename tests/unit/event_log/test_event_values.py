"""Values of the core on their way into a log, and back."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Iterator
from typing import Any

import orjson
import pytest

from lorax_contract.step import (
    AdapterHandle,
    LogitBias,
    NewRow,
    RequestId,
    RequestSpec,
    SamplingParams,
    StepOutcome,
    StepPlan,
    StoppingParams,
    TokenColumns,
)
from lorax_router.core.adapters.table import AdapterTable
from lorax_router.core.request import RequestTerms
from lorax_router.core.scheduler import Scheduler
from lorax_router.core.settings import CoreSettings
from lorax_router.event_log.recording import QUERIES
from lorax_router.event_log.values import LEFT_OUT, WAYS, ValueFormatError, ValueWriter, typed

PARTS = (Scheduler, AdapterTable)


def inputs() -> Iterator[tuple[str, Any]]:
    """Yield the types of all that may enter the core, by method and parameter."""
    for part in PARTS:
        for name, method in inspect.getmembers(part, inspect.isfunction):
            if not name.startswith("_") and name not in QUERIES[part.__name__]:
                for parameter, kind in typing.get_type_hints(method).items():
                    if parameter != "return" and callable(kind) and kind is not AdapterTable:
                        yield f"{part.__name__}.{name}({parameter})", kind


def types_within(kind: Any) -> Iterator[type]:
    """Yield the dataclasses that a type is made of."""
    while isinstance(kind, typing.NewType):
        kind = kind.__supertype__
    for argument in typing.get_args(kind):
        yield from types_within(argument)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        yield kind
        for name, each in typing.get_type_hints(kind).items():
            if (kind, name) not in LEFT_OUT and (kind, name) not in WAYS:
                yield from types_within(each)


def other_value(kind: Any, default: Any) -> Any:
    """Return a value of a type that is not its default."""
    while isinstance(kind, typing.NewType):
        kind = kind.__supertype__
    arguments = [each for each in typing.get_args(kind) if each is not type(None)]
    origin = typing.get_origin(kind)
    if origin is typing.Literal:
        return next(each for each in arguments if each != default)
    if origin is tuple:
        return (other_value(arguments[0], None),)
    if isinstance(origin, type) and issubclass(origin, dict):
        return {other_value(arguments[0], None): other_value(arguments[1], None)}
    if isinstance(origin, type):
        return [other_value(arguments[0], None)] if arguments and origin is not type(kind) else None
    if dataclasses.is_dataclass(kind):
        return filled(kind)
    if kind is bool:
        return not default
    if kind in (int, float):
        return kind(17)
    if kind is str:
        return "x"
    return next(each for each in kind if each is not default)


def filled(kind: Any) -> Any:
    """Return a value of a dataclass, each field of which is not its default."""
    hints = typing.get_type_hints(kind)
    values = {}
    for field in dataclasses.fields(kind):
        if (kind, field.name) in LEFT_OUT or (kind, field.name) in WAYS:
            continue
        hint = hints[field.name]
        options = [each for each in typing.get_args(hint) if each is not type(None)]
        if typing.get_origin(hint) in (typing.Union, type(int | str)) and options:
            hint = options[0]
        values[field.name] = other_value(hint, field.default)
    if kind is RequestSpec:
        values["prompt_ids"] = range(3)
    return kind(**values)


def there_and_back(value: Any) -> Any:
    """Return what is read of what was written."""
    plain = ValueWriter(b"secret").plain(value)
    text = orjson.dumps(plain, option=orjson.OPT_NON_STR_KEYS)
    return typed(type(value), orjson.loads(text))


KINDS = {kind for _, each in inputs() for kind in types_within(each)} | {CoreSettings}


@pytest.mark.parametrize("kind", sorted(KINDS, key=lambda each: each.__name__))
def test_every_field_that_enters_the_core_is_in_the_log(kind: type) -> None:
    """A field that comes later, too; what is left out is named in LEFT_OUT."""
    value = filled(kind)
    back = there_and_back(value)
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        if (kind, field.name) in LEFT_OUT or (kind, field.name) in WAYS:
            continue
        if (kind, field.name) == (RequestTerms, "cache_salt"):
            assert back.cache_salt not in ("", value.cache_salt)
        else:
            assert getattr(back, field.name) == getattr(value, field.name), field.name


def test_the_types_that_enter_the_core_are_looked_at() -> None:
    """The test above speaks of what it is meant to."""
    assert {RequestSpec, RequestTerms, SamplingParams, StoppingParams, StepOutcome} <= KINDS


def test_texts_and_token_ids_of_clients_stay_out() -> None:
    """Neither the prompt nor the output, nor what may not be said."""
    writer = ValueWriter(b"secret")
    spec = RequestSpec(
        request_id=RequestId(1), prompt_ids=[4711, 4712],
        sampling=SamplingParams(logit_bias=LogitBias((4711,), (1.0,))),
        stopping=StoppingParams(max_new_tokens=3, stop_sequences=("4711",)),
    )  # fmt: skip
    outcome = StepOutcome(
        1, [RequestId(1)], [1], [0], TokenColumns([4711], [-4711.0], ["4711"], [False]),
        inactive={AdapterHandle(3): "4711"},
    )  # fmt: skip
    plan = StepPlan(1, new_rows=[NewRow(spec, (4711,))])
    text = str(writer.plain([spec, outcome, plan, RequestTerms(cache_salt="4711")]))
    assert "4711" not in text
    back = there_and_back(outcome)
    assert back.tokens.ids == [0] and back.inactive.keys() == {3}
    assert len(there_and_back(spec).prompt_ids) == 2


def test_salts_are_as_different_as_they_were() -> None:
    """Within a log; those of two logs cannot be compared."""
    writer = ValueWriter(b"secret")
    one, other = (writer.plain(RequestTerms(cache_salt=salt)) for salt in ("a", "b"))
    assert one != other and one == writer.plain(RequestTerms(cache_salt="a"))
    assert ValueWriter(b"another").plain(RequestTerms(cache_salt="a")) != one
    assert writer.plain(RequestTerms())["cache_salt"] == ""


def test_numbers_that_json_has_not_come_back() -> None:
    """An endless deadline is one."""
    writer = ValueWriter(b"")
    assert typed(float, writer.plain(float("inf"))) == float("inf")


def test_a_value_of_an_unknown_type_is_refused_by_name() -> None:
    """Rather than written as something else."""
    with pytest.raises(ValueFormatError, match="complex"):
        ValueWriter(b"").plain(1j)
