"""Request bodies of all dialects: read with a bound, parsed strictly.

JSON types are taken at their word (``"5"`` is no number), and null means absent. Unknown
fields are kept aside, to be counted or refused.
"""

from __future__ import annotations

import codecs
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field
from pydantic import ValidationError as PydanticError
from pydantic_core import from_json
from starlette.requests import Request

from lorax_contract.errors import (
    BadRequestError,
    PayloadTooLargeError,
    UnsupportedMediaTypeError,
)
from lorax_router.http_api.auth import caller_of
from lorax_router.http_api.field_names import BodyError

# No field means more than 64 bits; larger numbers are refused before anything counts with them.
Integer = Annotated[int, Field(ge=-(2**63), le=2**64 - 1)]
Item = TypeVar("Item")
# A fault is reported for the first bad item only: 2 MB of them would take seconds to describe.
Items = Annotated[list[Item], Field(fail_fast=True)]
Body = TypeVar("Body", bound="StrictBody")

_MAX_SHOWN_FAULTS = 3


class StrictBody(BaseModel):
    """Strict types, finite numbers, unknown fields kept aside to be counted."""

    model_config = ConfigDict(
        extra="allow", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    def num_unknown_fields(self) -> int:
        """Number of fields, here and below, that nobody reads."""
        below = (getattr(self, name) for name in type(self).model_fields)
        nested = sum(each.num_unknown_fields() for each in below if isinstance(each, StrictBody))
        return len(self.model_extra or {}) + nested


def parse_body(model: type[Body], raw: bytes) -> Body:
    """Parse a JSON body; raises BadRequestError (no JSON) or BodyError (wrong types)."""
    try:
        body = model.model_validate_json(raw)
    except PydanticError as error:
        faults = error.errors(include_url=False, include_context=False, include_input=False)
    else:
        _check_numbers(raw)
        return body
    first = faults[0]
    if first["type"] == "json_invalid":
        raise BadRequestError(f"the body is not valid JSON: {_reason(raw, first['msg'])}")
    shown = "; ".join(
        f"{_path(fault['loc'])}: {fault['msg'][0].lower()}{fault['msg'][1:]}"
        for fault in faults[:_MAX_SHOWN_FAULTS]
    )
    more = len(faults) - _MAX_SHOWN_FAULTS
    raise BodyError(f"{shown}; and {more} more" if more > 0 else shown)


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Read a JSON body of at most ``max_bytes``; stops reading at the first byte too many.

    Raises UnsupportedMediaTypeError or PayloadTooLargeError.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    is_json = media_type == "application/json" or (
        media_type.startswith("application/") and media_type.endswith("+json")
    )
    if not is_json:
        raise UnsupportedMediaTypeError(
            "the body must be JSON: send Content-Type: application/json"
        )
    too_large = PayloadTooLargeError(f"the body is larger than {max_bytes} bytes")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > max_bytes:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise too_large
    return bytes(body)


def bearer_token(request: Request) -> str | None:
    """The token for the hub that stands for the caller, a secret; None without one.

    It is that of the Authorization header, unless the server has keys: then that header is one
    of them, no source is told it, and the caller's tenant may have a token of its own.
    """
    caller = caller_of(request)
    if caller.has_key:
        return caller.api_token
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    return token.strip() or None if scheme.lower() == "bearer" else None


def said(body: StrictBody) -> dict[str, Any]:
    """The fields that a client gave a value; null is absent, so that defaults apply."""
    values = ((name, getattr(body, name)) for name in type(body).model_fields)
    return {name: value for name, value in values if value is not None}


def _check_numbers(raw: bytes) -> None:
    """Raise BadRequestError for words that some write for numbers, wherever they stand."""
    if b"NaN" not in raw and b"Infinity" not in raw:
        return
    try:
        # Where any value is taken, the first reading took these, too.
        from_json(raw, allow_inf_nan=False)
    except ValueError:
        raise BadRequestError(
            "the body is not valid JSON: NaN and Infinity are no numbers in it"
        ) from None


def _reason(raw: bytes, parsers_words: str) -> str:
    """Why a body is no JSON; what happens to people in words that tell them what to do."""
    if raw.startswith(codecs.BOM_UTF8):
        return "it begins with a byte order mark; send UTF-8 without one"
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "it is encoded in UTF-16; send UTF-8"
    if "code point" in parsers_words:
        return "it is not UTF-8 throughout"
    if "hex escape" in parsers_words or "surrogate" in parsers_words:
        return (
            "a \\u escape stands for one half of a character without the other (a lone "
            "surrogate); send the characters themselves as UTF-8"
        )
    return parsers_words.removeprefix("Invalid JSON: ")


def _path(location: tuple[int | str, ...]) -> str:
    return "`" + ".".join(map(str, location)) + "`" if location else "the body"
