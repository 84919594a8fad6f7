"""Variables that others set as well, so that what they say may not be meant for this program.

HOSTNAME is a container's name more often than an address; LOG_LEVEL and LOG_FORMAT are written
in the words of other servers. What cannot be used is named in a warning, never an error.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from typing import Any, NamedTuple

from lorax_launcher.options import LauncherOptions

LOG_LEVELS = ("debug", "info", "warning", "error", "critical")
_SYNONYMS = {"trace": "debug", "warn": "warning", "off": "critical"}
_FORMATS = {"json": True, "text": False}
_DEFAULTS = LauncherOptions()


class Ambient(NamedTuple):
    """Options that the environment sets, by name, and what of it was not usable."""

    options: dict[str, Any]
    # By the option that they are about.
    warnings: dict[str, str]


def read_environment(environment: Mapping[str, str]) -> Ambient:
    """Return what these variables set; those that are absent or empty set nothing."""
    found = Ambient({}, {})
    readers = (("LOG_LEVEL", _log_level), ("LOG_FORMAT", _log_format), ("HOSTNAME", _hostname))
    for name, read in readers:
        if text := environment.get(name, "").strip():
            read(text, found)
    return found


def log_level(text: str) -> str | None:
    """Return the level that a word stands for, in other programs' words too; None for no level."""
    word = text.strip().lower()
    word = _SYNONYMS.get(word, word)
    return word if word in LOG_LEVELS else None


def _log_level(text: str, found: Ambient) -> None:
    """Take a level, or a list of levels by module as Rust's programs have it."""
    parts = [part for part in text.split(",") if part.strip()]
    levels = [level for part in parts if (level := log_level(part))]
    if levels:
        found.options["log_level"] = levels[-1]
    if len(levels) != len(parts):
        level = levels[-1] if levels else _DEFAULTS.log_level
        found.warnings["log_level"] = (
            f"LOG_LEVEL {text!r} is not used as a whole: there is one level for all modules, "
            f"and it is {level}"
        )


def _log_format(text: str, found: Ambient) -> None:
    as_json = _FORMATS.get(text.lower())
    if as_json is None:
        found.warnings["json_output"] = f"LOG_FORMAT {text!r} is not used: it may be text or json"
    else:
        found.options["json_output"] = as_json


def _hostname(text: str, found: Ambient) -> None:
    """Containers set HOSTNAME to their own name, which is no choice of the user's."""
    try:
        found.options["hostname"] = str(ipaddress.ip_address(text))
    except ValueError:
        found.warnings["hostname"] = (
            f"HOSTNAME {text!r} is not used: it is no IP address; --hostname says where to listen"
        )
