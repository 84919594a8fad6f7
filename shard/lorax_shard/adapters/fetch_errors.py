"""Why an adapter could not be had: one error, a short list of reasons, texts without secrets.

A text names the adapter and what to do; it is shown to the caller. Which reasons are
permanent decides how long the negative cache keeps them and whether to try again at once.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable, Mapping
from typing import Any, Self

from lorax_contract.errors import ErrorKind, LoraxError


class Reason(enum.Enum):
    """What kept an adapter from being fetched."""

    # The id or the revision does not exist at its source.
    NOT_FOUND = "not_found"
    # It exists, or may exist, and this caller is not let in.
    NO_ACCESS = "no_access"
    # The source is switched off, or this machine may not use the network.
    OFFLINE = "offline"
    # A limit on bytes or files was passed.
    TOO_LARGE = "too_large"
    # The bytes are not what the source announced, or cannot be read.
    CORRUPT = "corrupt"
    # Readable and not served: a wrong id, a pickle, an option or a shape that does not fit.
    REFUSED = "refused"
    # The source or the way to it is in trouble; a later try may succeed.
    TRANSIENT = "transient"
    # No entry of the store may give way for this one.
    STORE_FULL = "store_full"
    # The process that fetched it ended by itself or was ended for passing its limits.
    CRASHED = "crashed"

    @property
    def permanent(self) -> bool:
        """Whether the same request gets the same answer until somebody changes something."""
        return self not in (Reason.TRANSIENT, Reason.STORE_FULL, Reason.OFFLINE, Reason.CRASHED)


# LoRAX answers 424 when an adapter cannot be had; what is wrong with the adapter itself is 422.
_UNAVAILABLE = ErrorKind(424, "ABORTED", "generation", "Request failed during generation")
_REFUSED = ErrorKind(422, "INVALID_ARGUMENT", "validation", "Input validation error")
_KINDS = {Reason.REFUSED: _REFUSED, Reason.CORRUPT: _REFUSED, Reason.TOO_LARGE: _REFUSED}


class AdapterUnavailableError(LoraxError):
    """An adapter cannot be had. ``reason`` says why, the text says what to do."""

    def __init__(
        self, reason: Reason, text: str, *, retry_after_s: float | None = None, detail: str = ""
    ) -> None:
        super().__init__(text)
        self.kind = _KINDS.get(reason, _UNAVAILABLE)
        self.reason = reason
        self.text = text
        # When a new try makes sense, if anybody knows.
        self.retry_after_s = retry_after_s
        # For the log only.
        self.detail = detail

    def to_json(self) -> dict[str, Any]:
        """Return what crosses the pipe."""
        return {
            "reason": self.reason.value,
            "text": self.text,
            "retry_after_s": self.retry_after_s,
            "detail": self.detail,
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        """Read what ``to_json`` wrote."""
        return cls(
            Reason(document["reason"]),
            str(document["text"]),
            retry_after_s=document.get("retry_after_s"),
            detail=str(document.get("detail", "")),
        )


def without_secrets(text: str, secrets: Iterable[str | None]) -> str:
    """Return ``text`` without the given secrets and without the queries of URLs.

    Queries hold the signatures of presigned addresses.
    """
    for secret in secrets:
        if secret:
            text = text.replace(secret, "***")
    return re.sub(r"(https?://)(?:[^\s/@]*@)?([^\s?]+)\?\S+", r"\1\2", text)
