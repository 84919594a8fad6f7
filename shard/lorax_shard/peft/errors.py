"""How an adapter's content is refused: in one sentence that names what to change."""

from __future__ import annotations

from lorax_contract.errors import ErrorKind, LoraxError


class AdapterRefusedError(LoraxError):
    """An adapter was read and is not served; the text says why and what to do.

    The text does not name the adapter: whoever reads it for a request does.
    """

    kind = ErrorKind(422, "INVALID_ARGUMENT", "validation")


def shorten(value: object, limit: int = 120) -> str:
    """Return a value from a foreign file as text that is safe and short enough to show."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def plain(name: str, limit: int = 200) -> str:
    """Return a foreign name as text that a log line or an answer can hold."""
    text = name if name.isprintable() else repr(name)[1:-1]
    return text if len(text) <= limit else text[: limit - 1] + "…"


def listing(names: list[str], limit: int = 3) -> str:
    """Return some names and how many more there are."""
    shown = ", ".join(plain(name) for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
