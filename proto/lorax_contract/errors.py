"""The error tree of every process, and the one table of what a client sees.

    LoraxError
    ├── RequestError            the request is at fault; it alone fails
    │   ├── BadRequestError         not JSON, wrong content type, too large, slow
    │   ├── ValidationError         a value out of bounds, or one that can never fit
    │   ├── TemplateError           the chat template is missing or failed
    │   ├── UnauthenticatedError    no key, or one that nobody has
    │   ├── ForbiddenError          not for this caller, or not from there
    │   ├── AdapterNotLoadedError   an adapter that is to be managed is not known
    │   └── ModelNotFoundError      a request's model is neither the base nor an adapter
    ├── CapacityError           the server cannot take it now
    │   ├── OverloadedError         no permit left
    │   │   └── BusyError               the queue of all tenants is full
    │   ├── QuotaError              a tenant has used up what it may take in a minute
    │   │   └── QueueFullError          a tenant has as much waiting as it may
    │   └── ShuttingDownError       draining after SIGTERM
    ├── DeadlineError           the client's time is over, or will be too soon
    ├── GenerationError         a row or a step failed in a shard
    │   └── RowFailedError          by its own fault: it would fail again
    │       └── NoNumbersError          its logits were no finite numbers
    ├── IncompleteGenerationError   the stream ended without a last token
    ├── UnhealthyError          a health probe found the shards down
    ├── ShardError              router <-> shard protocol; never shown as it is
    │   ├── ShardUnavailableError   the process or its socket is gone
    │   └── StaleEpochError         the call was meant for an earlier incarnation
    └── StartupError            a process cannot start; carries an exit code

A message has two texts: ``public`` goes to the client behind the prefix of its
kind, ``str(error)`` goes to the log and may hold more.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lorax_contract.exit_codes import ExitCode
from lorax_contract.words import counted

# Of a text for the client, which may quote what the request said.
_MAX_PUBLIC_CHARS = 1_000


@dataclass(frozen=True, slots=True)
class ErrorKind:
    """How one kind of error is shown: HTTP status, gRPC status, LoRAX's ``error_type``."""

    http_status: int
    grpc_status: str
    error_type: str
    prefix: str = ""
    # Seconds after which it is worth another try; None: the same request fails again.
    retry_after_s: int | None = None


class LoraxError(Exception):
    """Root of all errors raised on purpose."""

    kind = ErrorKind(500, "INTERNAL", "internal", "Internal error")

    def __init__(self, message: str = "", *, public: str | None = None) -> None:
        super().__init__(message or self.kind.prefix)
        self._public = message if public is None else public

    @property
    def public(self) -> str:
        """The text for the client: prefix of the kind, then the message, in bounds."""
        prefix, text = self.kind.prefix, self._public
        if len(text) > _MAX_PUBLIC_CHARS:
            text = text[:_MAX_PUBLIC_CHARS] + "…"
        if not prefix or not text:
            return text or prefix
        return f"{prefix}: {text}"


class RequestError(LoraxError):
    """The request is at fault."""


class BadRequestError(RequestError):
    """The body cannot be read as what the route takes."""

    kind = ErrorKind(400, "INVALID_ARGUMENT", "bad_request")


class UnsupportedMediaTypeError(BadRequestError):
    """The content type is not JSON."""

    kind = ErrorKind(415, "INVALID_ARGUMENT", "bad_request")


class SlowRequestError(BadRequestError):
    """The request did not come in time."""

    kind = ErrorKind(408, "DEADLINE_EXCEEDED", "bad_request")


class PayloadTooLargeError(BadRequestError):
    """The body is larger than the server reads."""

    kind = ErrorKind(413, "INVALID_ARGUMENT", "bad_request")


class ValidationError(RequestError):
    """A value is out of bounds, or the request can never fit."""

    kind = ErrorKind(422, "INVALID_ARGUMENT", "validation", "Input validation error")


class TemplateError(RequestError):
    """The chat template is missing or could not be rendered."""

    kind = ErrorKind(422, "INVALID_ARGUMENT", "template_error", "Template error")


class UnauthenticatedError(RequestError):
    """The call names no API key, or one that is not known."""

    kind = ErrorKind(401, "UNAUTHENTICATED", "unauthenticated")


class ForbiddenError(RequestError):
    """It is not for this caller, or not from where the call comes."""

    kind = ErrorKind(403, "PERMISSION_DENIED", "forbidden")


class AdapterNotLoadedError(RequestError):
    """An adapter that somebody wants to manage is not known here."""

    kind = ErrorKind(404, "NOT_FOUND", "not_found")


class ModelNotFoundError(RequestError):
    """What a request names as its model is neither the base nor an adapter that it may use."""

    kind = ErrorKind(404, "NOT_FOUND", "model_not_found")


class CapacityError(LoraxError):
    """The server cannot take the request now."""


class OverloadedError(CapacityError):
    """All ``max_concurrent_requests`` permits are taken."""

    kind = ErrorKind(429, "RESOURCE_EXHAUSTED", "overloaded", "Model is overloaded", 1)


class QuotaError(CapacityError):
    """A tenant has used up one of its quotas; the text says which, and until when."""

    kind = ErrorKind(429, "RESOURCE_EXHAUSTED", "quota", "Quota exceeded", 1)

    def __init__(self, message: str = "", *, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.kind = replace(self.kind, retry_after_s=retry_after_s)


class QueueFullError(QuotaError):
    """A tenant has as much waiting as it may; the text says how much, and until when."""


class BusyError(OverloadedError):
    """All tenants together have as much waiting as may."""

    kind = ErrorKind(503, "UNAVAILABLE", "overloaded", "Model is overloaded", 1)

    def __init__(self, message: str = "", *, retry_after_s: int = 1) -> None:
        when = f"as much is waiting as may; try again in {counted(retry_after_s, 'second')}"
        super().__init__(message or when)
        self.kind = replace(self.kind, retry_after_s=retry_after_s)


class ShuttingDownError(CapacityError):
    """The server finishes what runs and takes nothing new."""

    # Another server, or this one started again, takes over: not at once.
    kind = ErrorKind(503, "UNAVAILABLE", "shutting_down", "Server is shutting down", 5)


class DeadlineError(LoraxError):
    """The time that a client gave its request is over, or is too short for what waits before it."""

    # Not 408: that says of a client that it was slow, and makes SDKs send the same again.
    kind = ErrorKind(504, "DEADLINE_EXCEEDED", "deadline", "Deadline exceeded")


class GenerationError(LoraxError):
    """A row or a step failed in a shard."""

    kind = ErrorKind(424, "ABORTED", "generation", "Request failed during generation")


class RowFailedError(GenerationError):
    """A row failed, and would again."""


class NoNumbersError(RowFailedError):
    """The logits of a row were no finite numbers."""


class IncompleteGenerationError(LoraxError):
    """The stream of a request ended without its last token."""

    kind = ErrorKind(500, "INTERNAL", "incomplete_generation", "Incomplete generation")


class UnhealthyError(LoraxError):
    """A health probe found the shards unable to serve."""

    kind = ErrorKind(503, "UNAVAILABLE", "healthcheck", "unhealthy", 5)


class ReplicaLostError(LoraxError):
    """The server that had the request is gone, and with it what it did not tell."""

    kind = ErrorKind(503, "UNAVAILABLE", "replica_lost", "The replica is gone", 1)


class ShardError(LoraxError):
    """A call to a shard failed; the front ends show it as a generation error."""

    # The gRPC statuses of these three tell router and shard which of them it was.
    kind = ErrorKind(424, "INTERNAL", "generation", "Request failed during generation")


class ShardUnavailableError(ShardError):
    """The shard process or its socket is gone."""

    kind = ErrorKind(424, "UNAVAILABLE", "generation", "Request failed during generation")


class StaleEpochError(ShardError):
    """The call named an epoch that this shard group does not serve."""

    kind = ErrorKind(424, "FAILED_PRECONDITION", "generation", "Request failed during generation")


class StartupError(LoraxError):
    """A process cannot start. The message says what is wrong and what to do."""

    def __init__(self, message: str, exit_code: ExitCode) -> None:
        super().__init__(message)
        self.exit_code = exit_code
