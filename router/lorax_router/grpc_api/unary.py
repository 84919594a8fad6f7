"""Calls that another process received and that this one's service answers: what does not generate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from google.protobuf.message import DecodeError, Message

from lorax_contract.errors import BadRequestError
from lorax_proto import lorax_pb2 as pb
from lorax_router.grpc_api.auth import bearer_of, caller_of
from lorax_router.grpc_api.servicer import PublicServicer
from lorax_router.service.callers import Caller
from lorax_router.service.keys.store import KeyStore

REQUESTS: dict[str, type[Message]] = {
    "Tokenize": pb.TokenizeRequest,
    "Detokenize": pb.DetokenizeRequest,
    "Info": pb.InfoRequest,
    "ListAdapters": pb.ListAdaptersRequest,
    "LoadAdapter": pb.LoadAdapterRequest,
    "UnloadAdapter": pb.UnloadAdapterRequest,
}


@dataclass(frozen=True, slots=True)
class _PassedOn:
    """Who makes a call that came by another process."""

    caller: Caller
    bearer_token: str | None = field(repr=False)


class UnaryCalls:
    """Answers them by the servicer's own methods; MessageCalls of the fronts.

    Args:
        servicer: the methods.
        keys: says who calls.
    """

    def __init__(self, servicer: PublicServicer, keys: KeyStore) -> None:
        self._servicer = servicer
        self._keys = keys

    async def answer(
        self, method: str, request: bytes, metadata: Sequence[tuple[str, str]]
    ) -> bytes:
        """Return the bytes of the answer; raises what is wrong with the call."""
        get = dict(metadata).get
        caller = caller_of(get, self._keys)
        kind = REQUESTS.get(method)
        if kind is None:
            raise BadRequestError(f"there is no method {method} here")
        message = kind()
        try:
            message.ParseFromString(request)
        except DecodeError:
            raise BadRequestError("the request is not the message that this method takes") from None
        asker = _PassedOn(caller, bearer_of(get, caller))
        answer: Message = await getattr(self._servicer, method)(message, asker)
        return answer.SerializeToString()
