"""What the programs beside this file check with; the standard library alone."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Any, NoReturn, TypeVar

Raised = TypeVar("Raised", bound=BaseException)
_MAX_SHOWN = 600


def check(name: str, found: object, *seen: object) -> None:
    """Say what was checked; ends the program if it is not so, with what was seen."""
    if not found:
        _fail(name, *seen or (found,))
    print(f"ok: {name}", flush=True)


def same(name: str, found: object, expected: object) -> None:
    """Check that two values are equal; says both if they are not."""
    check(name, found == expected, found, expected)


def raises(
    name: str, kind: type[Raised], call: Callable[..., Any], *args: Any, **named: Any
) -> Raised:
    """Check that a call raises this kind of error; returns it."""
    try:
        found = call(*args, **named)
    except BaseException as error:
        return _of_kind(name, kind, error)
    return _fail(name, found)


async def raises_later(
    name: str, kind: type[Raised], call: Callable[..., Awaitable[Any]], *args: Any, **named: Any
) -> Raised:
    """Check the same of a call that is awaited."""
    try:
        found = await call(*args, **named)
    except BaseException as error:
        return _of_kind(name, kind, error)
    return _fail(name, found)


def drained(call: Callable[..., Iterable[Any]], *args: Any, **named: Any) -> list[Any]:
    """Return all that a call streams."""
    return list(call(*args, **named))


def used(usage: Any) -> Any:
    """Return what an answer took, wherever it came from: asked again, more of it is cached."""
    found = usage if isinstance(usage, dict) else usage.model_dump()
    kept = _without_cache(found)
    if "input_tokens" in kept:
        # Anthropic's counts what is cached beside it.
        kept["input_tokens"] += found.get("cache_read_input_tokens") or 0
    return kept


def _without_cache(found: Any) -> Any:
    if not isinstance(found, dict):
        return found
    return {name: _without_cache(each) for name, each in found.items() if "cache" not in name}


def _of_kind(name: str, kind: type[Raised], error: BaseException) -> Raised:
    if not isinstance(error, kind):
        _fail(name, type(error), error)
    check(name, True)
    return error


def _fail(name: str, *seen: object) -> NoReturn:
    shown = "; ".join(repr(each)[:_MAX_SHOWN] for each in seen)
    raise SystemExit(f"not ok: {name}: {shown}")
