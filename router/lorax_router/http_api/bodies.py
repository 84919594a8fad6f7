"""Request bodies: read with a bound, parsed strictly, handed on as the service's values.

JSON types are taken at their word (``"5"`` is no number), null means absent, and
unknown fields are ignored, as LoRAX ignores them, and counted.
"""

from __future__ import annotations

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
        """Return the service's value."""
        return MergedAdapters(**_said(self))


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
    do_sample: bool | None = None
    """Draw tokens; implied by most sampling options."""
    max_new_tokens: Integer | None = None
    """Most tokens to generate; as many as fit if absent."""
    ignore_eos_token: bool | None = None
    """Go on after an end-of-sequence token."""
    return_full_text: bool | None = None
    """Put the prompt in front of the generated text."""
    stop: Items[str] | None = None
    """Texts that end the output; they stay in it."""
    stop_token_ids: Items[Integer] | None = None
    """Token ids that end the output."""
    truncate: Integer | None = None
    """Keep only the last so many tokens of the prompt."""
    watermark: bool | None = None
    """Not offered."""
    details: bool | None = None
    """Return tokens, logprobs and the finish reason too."""
    decoder_input_details: bool | None = None
    """Return the prompt's tokens with their logprobs too; not for streams."""
    return_k_alternatives: Integer | None = None
    """Return so many alternatives for each token."""
    apply_chat_template: bool | None = None
    """Treat `inputs` as one user message and render the model's chat template."""
    seed: Integer | None = None
    """Makes drawn tokens reproducible."""
    response_format: Any = None
    """Not offered yet."""

    def to_domain(self, bearer_token: str | None) -> GenerateParameters:
        """Return the service's value."""
        said = _said(self)
        said["has_response_format"] = said.pop("response_format", None) is not None
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

    stream: bool | None = None
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
    pin: bool | None = None
    """To load: keep the adapter ready until it is unpinned."""

    def to_domain(self, bearer_token: str | None) -> GenerateParameters:
        """Return the parameters of a request with this adapter."""
        return GenerateParameters(
            adapter_id=self.adapter_id,
            adapter_source=self.adapter_source,
            revision=self.revision,
            api_token=self.api_token or bearer_token,
        )


class TokenizeBody(StrictBody):
    """A text to tokenize."""

    inputs: str
    add_special_tokens: bool | None = None
    """Add the tokens that the model expects around a prompt; true if absent."""


def parse_body(model: type[Body], raw: bytes) -> Body:
    """Parse a JSON body; raises BadRequestError (no JSON) or ValidationError (wrong types)."""
    try:
        return model.model_validate_json(raw)
    except PydanticError as error:
        faults = error.errors(include_url=False, include_context=False, include_input=False)
    first = faults[0]
    if first["type"] == "json_invalid":
        reason = first["msg"].removeprefix("Invalid JSON: ")
        raise BadRequestError(f"the body is not valid JSON: {reason}")
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


def _path(location: tuple[int | str, ...]) -> str:
    return "`" + ".".join(map(str, location)) + "`" if location else "the body"
