"""Adapters with names of the operator's own choosing, as vLLM and TGI have them on the command line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from lorax_contract.adapters import AdapterRef, AdapterUnavailableError
from lorax_launcher.options import UsageError

_FORM = 'give it as name=path, or as JSON: {"name": "poet", "path": "/adapters/poet"}'
_KEYS = ("name", "path", "base_model_name")


class NamedModule(NamedTuple):
    """A name, and the adapter that it stands for."""

    name: str
    ref: AdapterRef
    # Which base the adapter was said to be for.
    base_model_name: str | None = None


def named_modules(
    modules: Iterable[str], adapters: str | None, default_source: str
) -> tuple[NamedModule, ...]:
    """Read ``--lora-modules`` and ``--lora-adapters``; raises UsageError in words."""
    found = [_module(text.strip(), default_source) for text in modules]
    # An id alone is its own name.
    parts = (part.strip() for part in (adapters or "").split(","))
    for part in filter(None, parts):
        text = part if "=" in part else f"{part}={part}"
        found.append(_named("--lora-adapters", *_split(text), default_source=default_source))
    names = [each.name for each in found]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"--lora-modules: two adapters have the name {name}; choose another.")
    return tuple(found)


def _module(text: str, default_source: str) -> NamedModule:
    if not text.startswith("{"):
        if "=" not in text:
            raise UsageError(f"--lora-modules {text} has no name: {_FORM}.")
        return _named("--lora-modules", *_split(text), default_source=default_source)
    try:
        document = json.loads(text)
    except ValueError as error:
        raise UsageError(f"--lora-modules {text} is not valid JSON: {_FORM}.") from error
    values = [document.get(key) for key in _KEYS]
    if not all(isinstance(value, str) for value in values[:2]) or not isinstance(
        values[2], str | None
    ):
        raise UsageError(f"--lora-modules {text} lacks a name or a path: {_FORM}.")
    if unknown := sorted(document.keys() - {*_KEYS}):
        raise UsageError(f"--lora-modules {text} has unknown keys: {', '.join(unknown)}.")
    module = _named("--lora-modules", *values[:2], default_source=default_source)
    return module._replace(base_model_name=values[2])


def _split(text: str) -> tuple[str, str]:
    name, _, path = text.partition("=")
    return name.strip(), path.strip()


def _named(flag: str, name: str, path: str, *, default_source: str) -> NamedModule:
    if not name or not path:
        raise UsageError(f"{flag} {name}={path} lacks a name or a path: {_FORM}.")
    try:
        return NamedModule(name, _ref(path, default_source))
    except AdapterUnavailableError as error:
        raise UsageError(f"{flag} {name}={path}: {error.text}.") from error


def _ref(path: str, default_source: str) -> AdapterRef:
    """Return what a path means: a folder that is there is that, whatever the default source."""
    folder = Path(path).expanduser()
    if path.startswith(("./", "../", "~")) or (folder.is_dir() and not folder.is_absolute()):
        return AdapterRef.of("local", os.path.abspath(folder))
    return AdapterRef.parse(path, default_source)
