"""What fields are called in errors: as the client sends them.

Texts of the service name fields as the service knows them; each dialect has its own names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

from lorax_contract.errors import LoraxError, ValidationError

_NO_NAMES: Mapping[str, str] = MappingProxyType({})
_FIELD = re.compile(r"`([a-z]\w*)((?:\.\w+)*)`")


class BodyError(ValidationError):
    """A field is at fault, and its text calls it as the client does."""


def in_words_of(names: Mapping[str, str], error: LoraxError, text: str) -> tuple[str, str | None]:
    """Return the text of an error with its fields renamed, and the first of them."""
    fields: list[str] = []
    if isinstance(error, BodyError):
        names = _NO_NAMES

    def renamed(match: re.Match[str]) -> str:
        fields.append(names.get(match[1], match[1]) + match[2])
        return f"`{fields[-1]}`"

    return _FIELD.sub(renamed, text), fields[0] if fields else None
