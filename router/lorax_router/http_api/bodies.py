"""Request bodies: read with a bound, parsed strictly, handed on as the service's values.

JSON types are taken at their word (``"5"`` is no number), and null means absent for the
fields where LoRAX takes it. Unknown fields are ignored, as LoRAX ignores them, and counted.
"""

from __future__ import annotations

import codecs
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field
from pydantic import ValidationError as PydanticError
from starlette.requests import Request

from lorax_contract.errors import (
    BadRequestError,
    PayloadTooLargeError,
    UnsupportedMediaTypeError,
    ValidationError,
)
from lorax_router.service.requests import GenerateParameters, GenerateRequest, MergedAdapters

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


class MergedAdaptersBody(StrictBody):
    """Several adapters merged for one request."""

    ids: Items[str]
    weights: Items[float] | None = None
    merge_strategy: str | None = None
    density: float | None = None
    majority_sign_method: str | None = None

    def to_domain(self) -> MergedAdapters:
        """Return the service's value; names of rules in any case, as LoRAX takes them."""
        said = _said(self)
        for name in ("merge_strategy", "majority_sign_method"):
            if name in said:
                said[name] = said[name].lower()
        return MergedAdapters(**said)


class ParametersBody(StrictBody):
    """How to generate; all are optional."""

    adapter_id: str | None = None
    """Adapter to use; the base model, or the server's own adapter, if absent."""
    adapter_source: str | None = None
    """Where the adapter lies: hub, local or s3; the server's default if absent."""
    merged_adapters: MergedAdaptersBody | None = None
    """Adapters to merge for this request; not together with `adapter_id`."""
    api_token: str | None = None
    """Token for private adapters; the Bearer token of the request if absent."""
    best_of: Integer | None = None
    """Generate so many sequences and return the likeliest first."""
    temperature: float | None = None
    """Divides the logits; 0 is greedy."""
    repetition_penalty: float | None = None
    """Above 0; 1 is none."""
    frequency_penalty: float | None = None
    """From -2 to 2."""
    presence_penalty: float | None = None
    """From -2 to 2."""
    top_k: Integer | None = None
    """Draw from the so many likeliest tokens."""
    top_p: float | None = None
    """Draw from the likeliest tokens that together reach this probability."""
    typical_p: float | None = None
    """Draw from the most typical tokens that together reach this probability."""
    min_p: float | None = None
    """Leave out tokens less likely than this times the likeliest one."""
    do_sample: bool = False
    """Draw tokens; implied by most sampling options."""
    max_new_tokens: Integer | None = None
    """Most tokens to generate; as many as fit if absent."""
    ignore_eos_token: bool = False
    """Go on after an end-of-sequence token."""
    return_full_text: bool | None = None
    """Put the prompt in front of the generated text."""
    stop: Items[str] = []
    """Texts that end the output; they stay in it. Empty ones end nothing."""
    stop_token_ids: Items[Integer] | None = None
    """Token ids that end the output."""
    truncate: Integer | None = None
    """Keep only the last so many tokens of the prompt."""
    watermark: bool = False
    """Not offered."""
    details: bool = False
    """Return tokens, logprobs and the finish reason too."""
    decoder_input_details: bool = False
    """Return the prompt's tokens with their logprobs too; not for streams."""
    return_k_alternatives: Integer | None = None
    """Return so many alternatives for each token."""
    apply_chat_template: bool = False
    """Treat `inputs` as one user message and render the model's chat template."""
    seed: Integer | None = None
    """Makes drawn tokens reproducible."""
    response_format: Any = None
    """Not offered yet, apart from the type `text`, which binds nothing."""

    def to_domain(self, bearer_token: str | None) -> GenerateParameters:
        """Return the service's value."""
        said = _said(self)
        said["has_response_format"] = _binds(said.pop("response_format", None))
        said["stop"] = [each for each in self.stop if each]
        if self.adapter_source is not None:
            said["adapter_source"] = self.adapter_source.lower()
        if self.merged_adapters is not None:
            said["merged_adapters"] = self.merged_adapters.to_domain()
        said.setdefault("api_token", bearer_token)
        return GenerateParameters(**said)


class GenerateBody(StrictBody):
    """A prompt and how to continue it."""

    inputs: str
    """The prompt; not empty."""
    parameters: ParametersBody | None = None

    def to_domain(self, bearer_token: str | None) -> GenerateRequest:
        """Return the service's value."""
        parameters = self.parameters or ParametersBody()
        return GenerateRequest(inputs=self.inputs, parameters=parameters.to_domain(bearer_token))


class CompatGenerateBody(GenerateBody):
    """A prompt and how to continue it, with the choice of a stream."""

    stream: bool = False
    """Answer with server-sent events."""


class AdapterBody(StrictBody):
    """An adapter to manage."""

    adapter_id: str
    """As requests name it."""
    adapter_source: str | None = None
    """Where the adapter lies: hub, local or s3; the server's default if absent."""
    revision: str | None = None
    """Branch, tag or commit on the hub; also as `adapter_id@revision`."""
    api_token: str | None = None
    """Token for private adapters; the Bearer token of the request if absent."""
    pin: bool = False
    """To load: keep the adapter ready until it is unpinned."""

    def to_domain(self, bearer_token: str | None) -> GenerateParameters:
        """Return the parameters of a request with this adapter."""
        return GenerateParameters(
            adapter_id=self.adapter_id,
            adapter_source=self.adapter_source and self.adapter_source.lower(),
            revision=self.revision,
            api_token=self.api_token or bearer_token,
        )


class TokenizeBody(StrictBody):
    """A text to tokenize."""

    inputs: str
    add_special_tokens: bool = True
    """Add the tokens that the model expects around a prompt."""


def parse_body(model: type[Body], raw: bytes) -> Body:
    """Parse a JSON body; raises BadRequestError (no JSON) or ValidationError (wrong types)."""
    try:
        return model.model_validate_json(raw)
    except PydanticError as error:
        faults = error.errors(include_url=False, include_context=False, include_input=False)
    first = faults[0]
    if first["type"] == "json_invalid":
        raise BadRequestError(f"the body is not valid JSON: {_reason(raw, first['msg'])}")
    shown = "; ".join(
        f"{_path(fault['loc'])}: {fault['msg'][0].lower()}{fault['msg'][1:]}"
        for fault in faults[:_MAX_SHOWN_FAULTS]
    )
    more = len(faults) - _MAX_SHOWN_FAULTS
    raise ValidationError(f"{shown}; and {more} more" if more > 0 else shown)


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
    """The token of the Authorization header, a secret; None without one."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    return token.strip() or None if scheme.lower() == "bearer" else None


def _said(body: StrictBody) -> dict[str, Any]:
    """The fields that a client gave a value; null is absent, so that defaults apply."""
    values = ((name, getattr(body, name)) for name in type(body).model_fields)
    return {name: value for name, value in values if value is not None}


def _binds(response_format: Any) -> bool:
    """Whether output is to be bound to something; LoRAX's type ``text`` leaves it free."""
    kind = response_format.get("type") if isinstance(response_format, dict) else None
    return response_format is not None and not (isinstance(kind, str) and kind.lower() == "text")


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
